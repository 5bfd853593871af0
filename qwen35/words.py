"""Numbers in messages."""


def number_of(number: int, what: str) -> str:
    """`1 bin`, `1,200 bins`, `2 micro-batches`."""
    ending = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}{ending}"
