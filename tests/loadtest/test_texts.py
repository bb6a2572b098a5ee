import pytest

from loadtest import texts

PARAGRAPH = "A sentence that goes on for a while, as they do. Another one follows (and is not short). " * 2


def test_the_reference_is_long_enough_for_all_tests():
    """Some four characters are a token."""
    assert len(texts.prose(texts.reference())) > 5 * 12288


def test_prose_is_running_paragraphs_each_once():
    first, second = PARAGRAPH.strip(), PARAGRAPH.strip() + " And\n   more."
    text = f"Title\n\n{first}\n\n   {first}\n\nx = [{first}]\n\n{second}\n\n{first}\n\nShort one.\n"
    assert texts.prose(text) == f"{first}\n{' '.join(second.split())}"


def test_text_without_prose_is_refused():
    with pytest.raises(ValueError, match="no paragraphs of sentences"):
        texts.prose("x = 1\n\ny = 2\n")


def test_sentences():
    assert texts.sentences("One. Is it two?\nThree!  v1.5 is four.") == [
        "One.",
        "Is it two?",
        "Three!",
        "v1.5 is four.",
    ]


def test_a_file_without_text_is_refused(tmp_path):
    file = tmp_path / "blank"
    file.write_text(" \n")
    with pytest.raises(ValueError, match="blank has no text"):
        texts.read(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="blank"):
        texts.read(file)
    file.write_text("Täxt", encoding="utf-8")
    assert texts.read(file) == "Täxt"
