"""Several texts continued at once, each token of all of them in one forward pass.

A pass over few rows costs little more than over one, because its time goes into reading the
weights. Texts join and leave between two passes (continuous batching): prompts are read one chunk
at a time in a cache of their own, which is then copied to the first free sequence of the batch.

What finished texts computed is kept, up to a number of bytes: of a new prompt only the tokens
behind the longest beginning that is known are computed.
"""

from collections.abc import Iterator, Sequence

from tinyllama.generate.completion import Completion, Made
from tinyllama.generate.generator import Decoder, Generator, Logits, Saved, common_length
from tinyllama.model.llama import Llama

__all__ = ["Batch", "Prefixes"]


class Prefixes:
    """Keys and values of texts that may begin the next ones, the last used of them."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._kept: list[tuple[list[int], Saved]] = []  # the last used one last

    def add(self, text: list[int], saved: Saved) -> None:
        """Keep what was computed of `text`, instead of any beginning of it."""
        self._kept = [kept for kept in self._kept if kept[0] != text[: len(kept[0])]]
        self._kept.append((text, saved))
        while self._kept and self.bytes > self._limit:
            del self._kept[0]

    @property
    def bytes(self) -> int:
        """The size of all that is kept."""
        return sum(part.nbytes for _, saved in self._kept for part in saved)

    def longest(self, text: Sequence[int]) -> tuple[int, list[int], Saved] | None:
        """Of the kept text that begins most like `text`: how many ids are alike, and itself."""
        if not self._kept:
            return None
        lengths = [common_length(kept, text) for kept, _ in self._kept]
        best = lengths.index(max(lengths))
        self._kept.append(self._kept.pop(best))
        return lengths[best], *self._kept[-1]


class Batch:
    """Up to `sequences` texts of one model, of at most `length` tokens each."""

    def __init__(
        self, model: Llama, length: int, sequences: int, prefix_bytes: int = 256 << 20
    ) -> None:
        """Where the device is no CPU, one text at a time: no kernel of ours takes several."""
        if model.parameters()[0].device != "CPU":
            sequences = 1
        self.sequences = sequences
        self._reader = Generator(model, length)
        self._decoder = Decoder(model, length, _graph_rows(sequences))
        self._rows: list[Completion] = []  # the cache of each holds all but its last token
        self._reading: tuple[Completion, Iterator[Logits]] | None = None
        self._prefixes = Prefixes(prefix_bytes)

    def compile(self) -> None:
        """Compile all graphs at once, instead of each when it is first needed."""
        self._reader.compile()
        rows = 1
        while rows <= _graph_rows(self.sequences):
            self._decoder.compile_step(rows)
            rows *= 2

    @property
    def computed(self) -> int:
        """Tokens that have gone through the model."""
        return self._reader.decoder.computed + self._decoder.computed

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._rows and self._reading is None

    @property
    def has_room(self) -> bool:
        """Whether another text can begin."""
        return self._reading is None and len(self._rows) < self.sequences

    def begin(self, completion: Completion) -> None:
        """Read a prompt in the next passes, and continue it. There must be room."""
        assert self.has_room
        text = completion.text
        known = self._prefixes.longest(text)
        if known is not None and known[0] > common_length(self._reader.held, text):
            _, held, saved = known
            self._reader.held.clear()
            self._reader.decoder.restore(0, len(held), saved)
            self._reader.held += held
        self._reading = completion, self._reader.reading(text)

    def drop(self, completion: Completion) -> None:
        """Leave a text as it is; nothing more is computed for it."""
        if self._reading is not None and self._reading[0] is completion:
            self._reading = None
        for place, row in enumerate(self._rows):
            if row is completion:
                self._remove(place)
                return

    def advance(self) -> list[tuple[Completion, Made]]:
        """One chunk of a prompt, and one token of every text: what was made for whom."""
        made = [*self._read(), *self._step()]
        for completion, _ in made:
            if completion.finish_reason is not None:
                self.drop(completion)
        return made

    def _step(self) -> Iterator[tuple[Completion, Made]]:
        rows = [*self._rows]
        if not rows:
            return
        texts = [row.text for row in rows]
        padding = [0] * (_graph_rows(len(rows)) - len(rows))  # sequences that are free
        tokens = [text[-1] for text in texts] + padding
        logits = self._decoder.step(tokens, [len(text) - 1 for text in texts] + padding)
        for row, values in zip(rows, logits, strict=False):
            yield row, row.advance(values)

    def _read(self) -> Iterator[tuple[Completion, Made]]:
        if self._reading is None:
            return
        completion, chunks = self._reading
        logits = next(chunks)
        if len(self._reader.held) < len(completion.text):
            return
        self._reading = None
        count = len(completion.text)
        made = completion.advance(logits)
        if completion.finish_reason is None:
            saved = self._reader.decoder.saved(0, count)
            self._decoder.restore(len(self._rows), count, saved)
            self._rows.append(completion)
        yield completion, made

    def _remove(self, place: int) -> None:
        """Keep a row's cache for prompts to come; the last row takes its place."""
        text = self._rows[place].text[:-1]
        self._prefixes.add(text, self._decoder.saved(place, len(text)))
        last = self._rows.pop()
        if place < len(self._rows):
            count = len(last.text) - 1
            self._decoder.restore(place, count, self._decoder.saved(len(self._rows), count))
            self._rows[place] = last


def _graph_rows(count: int) -> int:
    """The number of rows of the compiled graph for `count` texts: a power of two."""
    return 1 << (count - 1).bit_length()
