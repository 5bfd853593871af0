"""Parquet and video files for tests, by the real packages or by stand-ins with the same calls."""

import json
import sys
import types
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

HAS_PYARROW, HAS_AV = find_spec("pyarrow") is not None, find_spec("av") is not None


UNREADABLE = "what pyarrow has no Python value for"  # in the stand-in's files


def write_parquet(path: Path, records: list[dict], monkeypatch) -> None:
    if HAS_PYARROW:
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(records), path, row_group_size=2)
        return
    path.write_bytes(b"PAR1" + repr(records).encode())
    monkeypatch.setitem(sys.modules, "pyarrow", _pyarrow())


def _as_python(value):
    if value == UNREADABLE:
        raise ValueError("Nanosecond resolution temporal type 1 is not safely convertible")
    return value


def _pyarrow() -> types.ModuleType:
    import ast

    class ArrowException(Exception):  # noqa: N818  # its name
        pass

    class Batch(list):
        num_rows = property(len)

        def column(self, name):
            kind = "map<" if any("('" in repr(row[name]) for row in self) else "list<"  # pairs are tuples
            return types.SimpleNamespace(type=kind, to_pylist=lambda: [_as_python(row[name]) for row in self])

    class ParquetFile:
        def __init__(self, path):
            try:
                self._rows = ast.literal_eval(Path(path).read_bytes()[4:].decode())
            except (SyntaxError, ValueError) as error:
                raise ArrowException("Parquet magic bytes not found in footer.") from error
            names = dict.fromkeys(name for row in self._rows for name in row)
            self._rows = [{name: row.get(name) for name in names} for row in self._rows]
            self.schema_arrow = types.SimpleNamespace(names=list(names))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def iter_batches(self, batch_size, columns):
            assert batch_size > 0
            rows = [{name: row[name] for name in columns} for row in self._rows]
            return (Batch(rows[i : i + 2]) for i in range(0, len(rows), 2))

    module = types.ModuleType("pyarrow")
    module.ArrowException = ArrowException
    module.parquet = types.SimpleNamespace(ParquetFile=ParquetFile)
    return module


def write_video(
    path: Path,
    frames: np.ndarray,
    rate: Fraction,
    monkeypatch,
    counted: bool = True,
    title: bytes = b"a film",
    rotation: int = 0,
    times: Sequence[float] | None = None,
    is_raw: bool = False,
) -> None:
    """frames [T, H, W, 3] uint8 with even sides, stored without loss.

    counted: the header has the number of frames. rotation: degrees counter-clockwise, for display.
    times: seconds of each frame, whatever rate the header says. is_raw: without any container.
    """
    if HAS_AV:
        import av

        path_, container = (str(path), "h264" if is_raw else "mov" if counted else "matroska")
        with av.open(path_, "w", format=container) as out:
            out.metadata["title"] = stand_in = "t" * len(title)
            stream = out.add_stream("libx264rgb", rate=rate, options={"qp": "0"})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "rgb24"
            if rotation:
                stream.set_display_rotation(rotation)
            if times:
                stream.codec_context.time_base = Fraction(1, 1000)
            for number, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if times:
                    frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        path.write_bytes(path.read_bytes().replace(stand_in.encode(), title))
        return
    header = {"shape": frames.shape, "rate": str(rate), "counted": counted, "title": title.hex(), "rotation": rotation}
    header |= {"times": times or [number / float(rate) for number in range(len(frames))], "is_raw": is_raw}
    path.write_bytes(b"FILM" + json.dumps(header).encode() + b"\n" + frames.tobytes())
    monkeypatch.setitem(sys.modules, "av", stand_in_for_av())


def _rgb24(pixels: np.ndarray, **options: str) -> np.ndarray:
    assert options == {"format": "rgb24"}
    return pixels


def stand_in_for_av() -> types.ModuleType:
    class FFmpegError(Exception):
        pass

    class Stream:
        def __init__(self, data, errors):
            if data[:4] != b"FILM":
                raise FFmpegError("Invalid data found when processing input")
            header, _, self.pixels = data[4:].partition(b"\n")
            header = json.loads(header)
            self.title = bytes.fromhex(header["title"]).decode(errors=errors)
            self.shape = count, self.height, self.width, _ = header["shape"]
            self.frames = count if header["counted"] else 0
            self.rotation = header["rotation"]
            self.base_rate = self.average_rate = Fraction(header["rate"])
            self.is_raw, self.times, self.time_base = header["is_raw"], header["times"], Fraction(1, 1000)
            self.end = self.times[-1] + 1 / float(self.base_rate)
            if self.frames:
                self.average_rate = Fraction(count / (self.end - self.times[0])).limit_denominator(100_000)

        def whole(self):
            size = self.height * self.width * 3
            return [self.pixels[i : i + size] for i in range(0, len(self.pixels) // size * size, size)]

    class Container:
        def __init__(self, file, options, metadata_errors="strict"):
            assert set(options) == {"format_whitelist"}
            stream = Stream(file.read(), metadata_errors)
            self.streams = types.SimpleNamespace(video=[stream])
            self.format = types.SimpleNamespace(name="h264" if stream.is_raw else "matroska,webm")
            self.duration = None if stream.is_raw else round(stream.end * 1e6)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def demux(self, stream):
            found = [(len(frame), round(1000 * t)) for frame, t in zip(stream.whole(), stream.times, strict=False)]
            return (types.SimpleNamespace(size=size, pts=pts) for size, pts in (*found, (0, None)))

        def decode(self, stream):
            for data in stream.whole():
                pixels = np.frombuffer(data, np.uint8).reshape(stream.height, stream.width, 3)
                yield types.SimpleNamespace(to_ndarray=partial(_rgb24, pixels), rotation=stream.rotation)

    module = types.ModuleType("av")
    module.open = Container
    module.error = types.SimpleNamespace(FFmpegError=FFmpegError)
    return module
