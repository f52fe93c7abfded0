"""Many records in little memory: packed bytes, unpacked one at a time, and selections that copy nothing."""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

from dpt_t2i.data.records import Expression, ImageSource, Negative, Record


class RecordIndex(Sequence[Record]):
    """Records as one block of bytes (about 600 a record of COCO), which loader processes share without copying.

    An image that is a function stays an object beside the block; a file is packed as its path.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._sources: list[ImageSource] = []
        self._block, self._ends = bytearray(), array("Q", [0])
        for record in records:
            self._block += marshal.dumps(self._pack(record))
            self._ends.append(len(self._block))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        rows = range(len(self))[index]
        if isinstance(rows, range):
            return Selection(self, rows)
        return self._unpack(marshal.loads(memoryview(self._block)[self._ends[rows] : self._ends[rows + 1]]))

    @property
    def nbytes(self) -> int:
        """Bytes of the block and its offsets."""
        return len(self._block) + self._ends.itemsize * len(self._ends)

    def _pack(self, record: Record) -> tuple[Any, ...]:
        return (
            record.id,
            record.source,
            self._put(record.image),
            record.captions,
            tuple((e.text, e.spans, e.boxes) for e in record.expressions),
            tuple((n.caption, n.rule) for n in record.negatives),
            None if record.negative_image is None else self._put(record.negative_image),
            record.image_id,
            tuple(map(self._put, record.more_negative_images)),
            record.paired,
            record.boxes_of,
        )

    def _unpack(self, row: tuple[Any, ...]) -> Record:
        identity, source, image, captions, expressions, negatives, negative_image, image_id, *others = row
        more, paired, boxes_of = others
        return Record(
            identity,
            source,
            self._get(image),
            captions,
            tuple(Expression(*e) for e in expressions),
            tuple(Negative(*n) for n in negatives),
            None if negative_image is None else self._get(negative_image),
            image_id,
            tuple(map(self._get, more)),
            paired,
            boxes_of,
        )

    def _put(self, image: ImageSource) -> str | int:
        if isinstance(image, Path):
            return str(image)
        self._sources.append(image)
        return len(self._sources) - 1

    def _get(self, packed: str | int) -> ImageSource:
        return Path(packed) if isinstance(packed, str) else self._sources[packed]


class Selection(Sequence[Record]):
    """Some rows of a sequence, in a given order."""

    def __init__(self, records: Sequence[Record], rows: Sequence[int]) -> None:
        self._records, self._rows = records, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return Selection(self._records, self._rows[index])
        return self._records[self._rows[index]]
