"""Numbers in messages."""


def number_of(number: int, what: str) -> str:
    """`1 bin`, `1,200 bins`, `2 micro-batches`."""
    ending = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}{ending}"


def number_of_visuals(images: int, videos: int) -> str:
    """`2 images`, `1 image, 3 videos`."""
    return number_of(images, "image") + f", {number_of(videos, 'video')}" * (videos > 0)
