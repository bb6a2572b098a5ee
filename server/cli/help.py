"""Help in plain lines that no width of a terminal cuts names in, with the options under headings."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

# Lines of text break after a hyphen, which would cut --kv-memory-share in two.
_UNBREAKABLE = "\u2011"
# What typer calls types, and the names that `longspan serve` gives them.
_METAVARS = (
    ("<list[str]>", "TEXT"),
    ("<list[Path]>", "PATH"),
    ("<str>", "TEXT"),
    ("<int range>", "INTEGER"),
    ("<int>", "INTEGER"),
    ("<float range>", "NUMBER"),
    ("<float>", "NUMBER"),
    ("<path>", "PATH"),
)


class PlainCommand(TyperCommand):
    """A command whose help keeps names whole; options of one ``rich_help_panel`` stand under its title."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the arguments; those that are too many are refused with what to do."""
        if ctx.allow_extra_args:
            return super().parse_args(ctx, args)
        ctx.allow_extra_args = True
        rest = super().parse_args(ctx, args)
        if ctx.args and not ctx.resilient_parsing:
            ctx.fail(self.too_many(ctx.args))
        return rest

    def too_many(self, arguments: list[str]) -> str:
        """The sentence that refuses arguments that the command has no place for."""
        return (
            f"Got unexpected extra argument(s) ({' '.join(arguments)}): put a text with spaces into quotes, "
            "and name an option before its value."
        )

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments and options under their headings, in the order of each heading's first option."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            title = getattr(parameter, "rich_help_panel", None) or usual
            name, words = record
            for kind, metavar in _METAVARS:
                name = name.replace(kind, metavar)
            if len(name) > formatter.width - 2 * formatter.current_indent - 4:
                option, _, choices = name.partition(" ")
                name, words = f"{option} CHOICE", f"{words} CHOICE is {choices.replace('|', ', ')}."
            sections.setdefault(title, []).append((name, words.replace("-", _UNBREAKABLE)))
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Writes what the command does."""
        text = self.help
        self.help = text and text.replace("-", _UNBREAKABLE)
        super().format_help_text(ctx, formatter)
        self.help = text

    def get_help(self, ctx: Any) -> str:
        """The whole help."""
        return super().get_help(ctx).replace(_UNBREAKABLE, "-")
