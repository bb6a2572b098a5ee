"""``longspan token``: what it prints is a token of what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loadtest.cli.application import application
from server.access.callers import Callers
from server.access.identities import read_identities


def token(*arguments: str | Path) -> Result:
    return CliRunner().invoke(application, ["token", *map(str, arguments)])


def owner(file: Path, shown: str) -> str:
    caller = Callers(file).by_token([("authorization", f"Bearer {shown}")])
    assert caller is not None
    return caller.identity.name


def test_identities_are_added_to_a_file(tmp_path):
    file = tmp_path / "identities.toml"
    tokens = {}
    for name in ("alice", "a.b@example"):
        done = token(name, "--identities", file)
        assert done.exit_code == 0, done.output
        tokens[name] = done.stdout.strip()
    assert len(set(tokens.values())) == 2
    assert all(made.startswith("longspan_") and len(made) > 50 for made in tokens.values())
    assert {name: owner(file, made) for name, made in tokens.items()} == {name: name for name in tokens}
    assert not any(made in file.read_text() for made in tokens.values())


def test_without_a_file_its_entry_is_printed_apart(tmp_path):
    done = token("alice")
    file = tmp_path / "identities.toml"
    file.write_text(
        "\n".join(line for line in done.stderr.splitlines() if line.startswith(("[", "token_sha")))
    )
    assert owner(file, done.stdout.strip()) == "alice"


def test_a_known_identity_keeps_its_tokens(tmp_path):
    file = tmp_path / "identities.toml"
    assert token("alice", "--identities", file).exit_code == 0
    before = file.read_text()
    done = token("alice", "--identities", file)
    assert (done.exit_code, done.stdout, file.read_text()) == (1, "", before)
    assert "has alice already; for another token run this without --identities" in done.stderr


@pytest.mark.parametrize(
    ("name", "text", "sentence", "code"),
    [
        ("a b", "", "'a b' is no name of an identity", 2),
        ("alice", "[bob", "is not valid TOML", 1),
        ("alice", "bob.certificates = ['b']\nalice.certificates = ['a']", "has alice already", 1),
    ],
)
def test_mistakes_are_sentences(tmp_path, name, text, sentence, code):
    file = tmp_path / "identities.toml"
    file.write_text(text)
    done = token(name, "--identities", file)
    assert (done.exit_code, done.stdout, file.read_text()) == (code, "", text)
    assert sentence in done.stderr


def test_a_folder_that_is_not_there(tmp_path):
    done = token("alice", "--identities", tmp_path / "gone" / "identities.toml")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "can't be written" in done.stderr


@pytest.mark.parametrize("text", ["", "# ours\n", "# ours", "\n"])
def test_a_file_without_identities_takes_the_first(tmp_path, text):
    file = tmp_path / "identities.toml"
    file.write_text(text)
    assert token("alice", "--identities", file).exit_code == 0
    assert [identity.name for identity in read_identities(file)] == ["alice"]
    assert file.read_text().startswith(text)


def test_a_file_without_a_newline_at_its_end_stays_whole(tmp_path):
    file = tmp_path / "identities.toml"
    file.write_text("[bob]\ncertificates = ['b']\nmetrics = true")
    done = token("alice", "--identities", file)
    assert done.exit_code == 0, done.output
    assert [identity.name for identity in read_identities(file)] == ["bob", "alice"]
    assert owner(file, done.stdout.strip()) == "alice"


def test_the_servers_file_is_touched_only_by_the_flag(tmp_path, monkeypatch):
    """So that the advice for a known identity holds where the environment names the file."""
    file = tmp_path / "identities.toml"
    assert token("alice", "--identities", file).exit_code == 0
    monkeypatch.setenv("LONGSPAN_IDENTITIES", str(file))
    before = file.read_text()
    done = token("alice")
    assert (done.exit_code, file.read_text()) == (0, before)
    assert "token_sha256" in done.stderr


def test_no_token_is_shown_that_the_file_does_not_have(tmp_path, monkeypatch):
    file = tmp_path / "identities.toml"
    monkeypatch.setattr("server.access.identities.read_identities", lambda _: ())
    done = token("alice", "--identities", file)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "run this again" in done.stderr
