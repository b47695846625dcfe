"""Global and shared memory of the emulated GPU, which notice accesses that a real one would not."""

import ctypes

import numpy as np

SHARED_BYTES = 1 << 18
MANY = -2  # in place of a thread: several threads
ATOMIC = -3  # in place of a thread: an atomic operation


class Fault(Exception):
    """The program does what is wrong on a GPU, or what the emulator does not know."""


class GlobalMemory:
    """The tensors of one launch, and who wrote and read each of their bytes last.

    Programs are executed one after another, but an access is allowed only if it would be right in
    any order. Two accesses of one byte, one of them a write, must be separated by a barrier (threads
    of one program), or by atomics that release and acquire (different programs).

    Args:
        tensors: pairs of a name and a dense tensor on the CPU.
    """

    def __init__(self, tensors):
        self.blocks = []
        self.released = {}  # by address of an atomic: up to which epoch of which programs
        seen = set()
        for name, tensor in tensors:
            begin, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            if size and (begin, size) not in seen:
                seen.add((begin, size))
                self.blocks.append(_Block(name, tensor, begin, size))

    def find(self, addresses, size):
        """Yield each block and the positions of its addresses.

        Raises:
            Fault: if an access is not within one tensor.
        """
        left = np.ones(len(addresses), bool)
        for block in self.blocks:
            inside = (addresses >= block.begin) & (addresses + size <= block.end) & left
            if inside.any():
                left &= ~inside
                yield block, np.nonzero(inside)[0]
        if left.any():
            address = int(addresses[left][0])
            near = min(self.blocks, key=lambda b: min(abs(address - b.begin), abs(address - b.end)))
            raise Fault(
                f"out of range: offset {address - near.begin} of {near.name}, which has "
                f"{near.end - near.begin} bytes"
            )


class _Block:
    def __init__(self, name, tensor, begin, size):
        self.name, self.tensor, self.begin, self.end = name, tensor, begin, begin + size
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin))
        self.writer, self.reader = _Shadow(size), _Shadow(size)


class _Shadow:
    """For each byte: program, thread and epoch of the last access of a kind."""

    def __init__(self, size):
        self.program = np.full(size, -1, np.int64)
        self.thread = np.full(size, -1, np.int64)
        self.epoch = np.full(size, -1, np.int64)

    def set(self, offsets, program, threads, epoch):
        self.program[offsets], self.thread[offsets] = program, threads
        self.epoch[offsets] = epoch

    def conflict(self, offsets, view, threads):
        """Return whether an access by `threads` of a program is not ordered after these accesses."""
        program, epoch = self.program[offsets], self.epoch[offsets]
        own = (program == view.program) & (epoch == view.epoch)
        if (own & (self.thread[offsets] != threads)).any():
            return "another thread since the barrier"
        others = (program >= 0) & (program != view.program)
        if others.any():
            pairs = {(int(p), int(e)) for p, e in zip(program[others], epoch[others], strict=True)}
            if any(view.acquired.get(p, -1) <= e for p, e in pairs):
                return "another program"
        return None


class View:
    """The memory as one program sees it.

    Attributes:
        epoch: the number of barriers so far.
        acquired: by program, the epoch before which its accesses are visible.
    """

    def __init__(self, memory, program, threads):
        self.memory, self.program, self.epoch = memory, program, 0
        self.threads = np.arange(threads)
        self.acquired, self.pending = {}, {}
        # Garbage: what is not written must not matter.
        self.shared = np.random.default_rng(program).integers(0, 256, SHARED_BYTES, dtype=np.uint8)
        self.shared_writer, self.shared_reader = _Shadow(SHARED_BYTES), _Shadow(SHARED_BYTES)

    def barrier(self):
        self.epoch += 1
        _merge(self.acquired, self.pending)

    def load(self, addresses, size, active, line):
        out = np.zeros((len(addresses), size), np.uint8)
        for block, threads, offsets in self._accesses(addresses, size, active, line):
            if by := block.writer.conflict(offsets, self, threads[:, None]):
                raise Fault(f"race: reads {block.name} written by {by}: {line}")
            out[threads] = block.bytes[offsets]
            reader = block.reader
            again = (reader.program[offsets] == self.program) & (
                reader.epoch[offsets] == self.epoch
            )
            again &= reader.thread[offsets] != threads[:, None]
            reader.set(offsets, self.program, np.where(again, MANY, threads[:, None]), self.epoch)
            places, times = np.unique(offsets, return_counts=True)
            reader.thread[places[times > 1]] = MANY
        return out

    def store(self, addresses, values, size, active, line):
        for block, threads, offsets in self._accesses(addresses, size, active, line):
            if len(np.unique(offsets)) < offsets.size:
                raise Fault(f"two threads write {block.name} at once: {line}")
            for shadow, what in (block.reader, "read"), (block.writer, "written"):
                if by := shadow.conflict(offsets, self, threads[:, None]):
                    raise Fault(f"race: writes {block.name} {what} by {by}: {line}")
            block.bytes[offsets] = values[threads]
            block.writer.set(offsets, self.program, threads[:, None], self.epoch)

    def atomic_add(self, addresses, values, active, acquire, release, line):
        """Add 64-bit integers; return what was there before.

        With `release`, what this program has done before its last barrier is visible to those who
        acquire it; with `acquire`, what others have released becomes visible at the next barrier.
        """
        out = np.zeros(len(addresses), np.uint64)
        for block, threads, offsets in self._accesses(addresses, 8, active, line):
            for thread, place in zip(threads, offsets, strict=True):
                atomic = (block.writer.thread[place] == ATOMIC).all()
                if not atomic and (by := block.writer.conflict(place, self, thread)):
                    raise Fault(f"race: atomic on {block.name} written by {by}: {line}")
                word = block.bytes[place[0] : place[0] + 8].view(np.uint64)
                out[thread] = word[0]
                word[0] += values[thread]
                # Later accesses of others are ordered after this one if they acquire it.
                block.writer.set(place, self.program, ATOMIC, self.epoch - 1)
                released = self.memory.released.setdefault((block.name, int(place[0])), {})
                if acquire:
                    _merge(self.pending, released)
                if release:
                    _merge(released, self.acquired)
                    _merge(released, {self.program: self.epoch})
        return out

    def _accesses(self, addresses, size, active, line):
        threads = np.nonzero(active)[0]
        if not len(threads):
            return
        chosen = addresses[threads]
        _check_alignment(chosen, size, line)
        for block, places in self.memory.find(chosen, size):
            offsets = (chosen[places] - block.begin)[:, None] + np.arange(size)
            yield block, threads[places], offsets

    def load_shared(self, addresses, size, active, line):
        out = np.zeros((len(addresses), size), np.uint8)
        threads, offsets = self._shared(addresses, size, active, line)
        out[threads] = self.shared[offsets]
        if (self.shared_writer.epoch[offsets] < 0).any():
            raise Fault(f"reads shared memory never written: {line}")
        if self._other_warp(self.shared_writer, offsets, threads).any():
            raise Fault(f"race: reads shared memory: {line}")
        several = self._other_warp(self.shared_reader, offsets, threads)
        self.shared_reader.set(offsets, 0, np.where(several, MANY, threads[:, None]), self.epoch)
        return out

    def store_shared(self, addresses, values, size, active, line):
        threads, offsets = self._shared(addresses, size, active, line)
        for shadow in self.shared_reader, self.shared_writer:
            if self._other_warp(shadow, offsets, threads).any():
                raise Fault(f"race: writes shared memory: {line}")
        self.shared[offsets] = values[threads]
        self.shared_writer.set(offsets, 0, threads[:, None], self.epoch)

    def _shared(self, addresses, size, active, line):
        threads = np.nonzero(active)[0]
        _check_alignment(addresses[threads], size, line)
        return threads, addresses[threads][:, None] + np.arange(size)

    def _other_warp(self, shadow, offsets, threads):
        """Return where the last access since the barrier was not by the same warp, which is in step."""
        last = shadow.thread[offsets]
        other = (last == MANY) | (last // 32 != threads[:, None] // 32)
        return (shadow.epoch[offsets] == self.epoch) & other


def _check_alignment(addresses, size, line):
    if (addresses % size).any():
        raise Fault(f"misaligned access of {size} bytes: {line}")


def _merge(into, other):
    for program, epoch in other.items():
        into[program] = max(epoch, into.get(program, -1))
