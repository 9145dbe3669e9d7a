"""Pieces of HTML that the page is made of."""

from collections.abc import Iterable, Sequence
from html import escape


def section(title: str, text: str, content: str) -> str:
    """text: plain; content: HTML."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of plain text; a click on a column's head sorts by it."""
    heads = "".join(f"<th scope=col><button>{escape(name)}</button></th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what is said of them, plain text."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in pairs) + "</dl>"


def wide(svg: str) -> str:
    """A figure that keeps its letters readable on a narrow screen, where it scrolls by itself."""
    return f"<div class=wide>{svg}</div>"


def example(caption: str, *texts: tuple[str, str]) -> str:
    """caption: plain; texts: each under a plain label, as HTML, side by side where there is room."""
    columns = "".join(f"<div><h3>{escape(label)}</h3><p class=tokens>{html}</p></div>" for label, html in texts)
    return f"<figure><figcaption>{escape(caption)}</figcaption><div class=beside>{columns}</div></figure>"
