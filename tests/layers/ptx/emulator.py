"""Executes the PTX of a Triton kernel: all threads of a program in step, with checks of memory.

It knows the instructions that the project's kernels are compiled to. Results of approximate
instructions (div.full, rsqrt, sqrt, rcp) are changed at random by 1 or 2 units in the last place, as
hardware may do. Registers are numpy arrays with one element for each thread, unsigned integers of the
register's width; predicates are bools.
"""

import re
from dataclasses import dataclass

import numpy as np
from memory import Fault, GlobalMemory, View

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # Of unsigned integers.
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
SMALLEST_NORMAL = np.finfo(np.float32).tiny
_random = np.random.default_rng(0)


def as_float(bits):
    return bits.view(np.float32)


def as_bits(values):
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def approximate(values, ulps):
    """Return float32 values, moved by up to so many units in the last place."""
    values = values.astype(np.float32)
    moved = values.view(np.int32) + _random.integers(-ulps, ulps + 1, values.shape, dtype=np.int32)
    return np.where(np.isfinite(values) & (values != 0), moved.view(np.float32), values)


def flush_subnormal(values):
    zero = np.copysign(np.float32(0), values)
    return np.where(np.abs(values) < SMALLEST_NORMAL, zero, values).astype(np.float32)


def to_half(values):
    return values.astype(np.float16).view(np.uint16)


def to_bfloat16(values):
    bits = as_bits(values).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def width_of(type_name):
    return int(re.sub(r"\D", "", type_name))


def integer_type(type_name):
    return (SIGNED if type_name[0] == "s" else UNSIGNED)[width_of(type_name)]


@dataclass
class Instruction:
    """One line of PTX, in parts.

    Attributes:
        name: the operation with its suffixes, a list.
        arguments: the operands as text.
        predicate: None, or a register and whether it is negated.
    """

    name: list
    arguments: list
    predicate: tuple | None
    line: str

    @property
    def type(self):
        return self.name[-1]


def split_operands(text):
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    return [*operands, current.strip()] if current.strip() else operands


def parse(ptx):
    """Return a kernel's parameters (name, type), instructions, labels and number of threads."""
    threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx).group(1))
    parameters, instructions, labels, in_body = [], [], {}, False
    for line in ptx.splitlines():
        line = line.split("//")[0].strip().replace("\t", " ")
        # Of older versions: a block of one line with a name for what is not used.
        if block := re.match(r"\{ \.reg \.b16 (\w+); (.*); \}$", line):
            line = re.sub(rf"\b{block.group(1)}\b", "_", block.group(2))
        if line.startswith(".param"):
            match = re.match(r"\.param \.(\w+)\s.*?([\w$]+),?$", line)
            parameters.append((match.group(2), match.group(1)))
        elif line.startswith("{"):
            in_body = True
        elif line.startswith("}") and in_body:
            break
        elif in_body and line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        elif in_body and line and not line.startswith((".", "}")):
            line = line.rstrip(";")
            match = re.match(r"(?:@(!?)(%p\d+)\s+)?(\S+)\s*(.*)$", line)
            negated, register, name, operands = match.groups()
            predicate = (register, negated == "!") if register else None
            instructions.append(
                Instruction(name.split("."), split_operands(operands), predicate, line)
            )
    return parameters, instructions, labels, threads


class State:
    """A running program: its registers, its view of memory and its place in the code."""

    def __init__(self, program, index, programs, values, memory):
        self.at = 0
        self.view = View(memory, index, program.threads)
        self.parameters = {}
        for (name, kind), value in zip(program.parameters, values, strict=True):
            dtype = UNSIGNED[width_of(kind)]
            self.parameters[name] = np.full(program.threads, value, np.uint64).astype(dtype)
        self.registers = {
            "%tid.x": np.arange(program.threads, dtype=np.uint32),
            "%ctaid.x": np.full(program.threads, index, np.uint32),
            "%nctaid.x": np.full(program.threads, programs, np.uint32),
        }
        self.all = np.ones(program.threads, bool)

    def active(self, predicate):
        if predicate is None:
            return self.all
        value = self.registers[predicate[0]]
        return ~value if predicate[1] else value

    def set(self, register, value, predicate=None):
        if predicate is not None:
            old = self.registers.get(register, 0)
            value = np.where(self.active(predicate), value, old).astype(value.dtype)
        self.registers[register] = value


class Program:
    """The code of a kernel: `steps` are functions of a State."""

    def __init__(self, ptx):
        self.parameters, instructions, self.labels, self.threads = parse(ptx)
        self.steps = [self._compile(instruction) for instruction in instructions]

    def run(self, programs, values, memory: GlobalMemory):
        """Execute a grid, its programs in random order.

        Args:
            values: of the parameters, as unsigned integers.
        """
        for index in _random.permutation(programs):
            state = State(self, int(index), programs, values, memory)
            with np.errstate(all="ignore"):
                while state.at < len(self.steps):
                    step = self.steps[state.at]
                    state.at += 1
                    step(state)

    def _compile(self, i):
        method = getattr(self, "_" + i.name[0], None)
        if method is None:
            raise Fault(f"unknown instruction: {i.line}")
        return method(i)

    # Operands.

    def _read(self, operand, width):
        """Return a function of a State: the value of a register or constant."""
        if operand.startswith("%"):
            return lambda s: s.registers[operand].astype(UNSIGNED[width], copy=False)
        if operand.startswith("0f"):
            value = int(operand[2:], 16)
        elif operand == "global_smem":
            value = 0
        else:
            value = int(operand.rstrip("U"), 0) & ((1 << width) - 1)
        constant = np.full(self.threads, value, UNSIGNED[width])
        return lambda s: constant

    def _read_predicate(self, operand):
        if operand.startswith("!"):
            return lambda s: ~s.registers[operand[1:]]
        if operand.startswith("%"):
            return lambda s: s.registers[operand]
        constant = np.full(self.threads, bool(int(operand) & 1))
        return lambda s: constant

    def _sources(self, i, kind, first=1):
        """Return functions for the operands from `first` on, as values of a type."""
        if kind == "pred":
            return [self._read_predicate(operand) for operand in i.arguments[first:]]
        readers = [self._read(operand, width_of(kind)) for operand in i.arguments[first:]]
        if kind == "f32":
            return [lambda s, read=read: as_float(read(s)) for read in readers]
        return [lambda s, read=read: read(s).view(integer_type(kind)) for read in readers]

    def _assign(self, i, function):
        """Return the step that computes the destination by `function`, of numbers of any type."""

        def step(s):
            value = function(s)
            if value.dtype == np.float32:
                value = as_bits(value)
            elif value.dtype != bool:
                value = value.view(UNSIGNED[value.dtype.itemsize * 8])
            s.set(i.arguments[0], value, i.predicate)

        return step

    def _operation(self, i, function):
        """Return the step for an instruction whose operands and result have its type."""
        sources = self._sources(i, i.type)
        return self._assign(i, lambda s: function(*(read(s) for read in sources)))

    # Arithmetic.

    def _add(self, i):
        return self._operation(i, np.add)

    def _sub(self, i):
        return self._operation(i, np.subtract)

    def _and(self, i):
        return self._operation(i, np.bitwise_and)

    def _or(self, i):
        return self._operation(i, np.bitwise_or)

    def _xor(self, i):
        return self._operation(i, np.bitwise_xor)

    def _not(self, i):
        return self._operation(i, np.invert)

    def _min(self, i):
        return self._operation(i, np.fmin)

    def _max(self, i):
        return self._operation(i, np.fmax)

    def _abs(self, i):
        return self._operation(i, np.abs)

    def _neg(self, i):
        return self._operation(i, np.negative)

    def _sqrt(self, i):
        return self._operation(i, lambda a: approximate(np.sqrt(flush_subnormal(a)), 1))

    def _rsqrt(self, i):
        return self._operation(i, lambda a: approximate(1 / np.sqrt(flush_subnormal(a)), 2))

    def _rcp(self, i):
        return self._operation(i, lambda a: approximate(1 / a, 1))

    def _fma(self, i):
        if i.name[1:] != ["rn", "f32"]:
            raise Fault(f"unknown instruction: {i.line}")
        # The product of two float32 is exact in float64.
        return self._operation(i, lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32))

    def _mul(self, i):
        if i.type == "f32" or "lo" in i.name:
            return self._operation(i, np.multiply)
        return self._wide(i, lambda a, b: a * b)

    def _mad(self, i):
        if "lo" in i.name:
            return self._operation(i, lambda a, b, c: a * b + c)
        add = self._read(i.arguments[3], 2 * width_of(i.type))
        product = self._wide_product(i)
        return self._assign(i, lambda s: product(s) + add(s).view(product(s).dtype))

    def _wide(self, i, function):
        product = self._wide_product(i)
        if "wide" in i.name:
            return self._assign(i, product)
        if "hi" not in i.name or width_of(i.type) != 32:
            raise Fault(f"unknown instruction: {i.line}")
        return self._assign(i, lambda s: (product(s) >> 32).astype(integer_type(i.type)))

    def _wide_product(self, i):
        a, b = self._sources(i, i.type)[:2]
        wide = integer_type(i.type[0] + str(2 * width_of(i.type)))
        return lambda s: a(s).astype(wide) * b(s).astype(wide)

    def _div(self, i):
        if i.type == "f32":
            exact = not {"full", "approx"} & set(i.name)
            return self._operation(i, lambda a, b: a / b if exact else approximate(a / b, 2))

        def divide(a, b):
            b = np.where(b == 0, 1, b).astype(b.dtype)
            return ((a - np.fmod(a, b)) // b).astype(b.dtype)  # towards zero

        return self._operation(i, divide)

    def _rem(self, i):
        return self._operation(i, lambda a, b: np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype)))

    def _shift(self, i, function):
        value, by = self._sources(i, i.type)[0], self._read(i.arguments[2], 32)
        return self._assign(i, lambda s: function(value(s), by(s), width_of(i.type)))

    def _shl(self, i):
        def shift(a, by, width):
            return np.where(by < width, a << (by % width).astype(a.dtype), 0).astype(a.dtype)

        return self._shift(i, shift)

    def _shr(self, i):
        def shift(a, by, width):
            moved = a >> np.minimum(by, width - 1).astype(a.dtype)
            if np.issubdtype(a.dtype, np.signedinteger):
                return moved
            return np.where(by < width, moved, 0).astype(a.dtype)

        return self._shift(i, shift)

    def _shf(self, i):
        if i.name[2:] != ["wrap", "b32"]:
            raise Fault(f"unknown instruction: {i.line}")
        low, high, by = self._sources(i, "u32")

        def shift(s):
            both = (high(s).astype(np.uint64) << 32) | low(s)
            count = (by(s) & 31).astype(np.uint64)
            if i.name[1] == "l":
                return ((both << count) >> 32).astype(np.uint32)
            return (both >> count).astype(np.uint32)

        return self._assign(i, shift)

    def _bfe(self, i):
        read = self._sources(i, i.type)[0]
        first, bits = int(i.arguments[2]), int(i.arguments[3])
        return self._assign(i, lambda s: (read(s) << (32 - first - bits)) >> (32 - bits))

    def _prmt(self, i):
        a, b = self._read(i.arguments[1], 32), self._read(i.arguments[2], 32)
        selector = int(i.arguments[3].rstrip("U"), 0)
        chosen = [(selector >> (4 * k)) & 7 for k in range(4)]

        def permute(s):
            parts = [np.ascontiguousarray(v).view(np.uint8).reshape(-1, 4) for v in (a(s), b(s))]
            both = np.concatenate(parts, 1)
            return np.ascontiguousarray(both[:, chosen]).view(np.uint32).reshape(-1)

        return self._assign(i, permute)

    # Choices and conversions.

    def _selp(self, i):
        a, b = (self._read(operand, width_of(i.type)) for operand in i.arguments[1:3])
        condition = self._read_predicate(i.arguments[3])
        return self._assign(i, lambda s: np.where(condition(s), a(s), b(s)))

    def _setp(self, i):
        a, b = self._sources(i, i.type)
        name = i.name[1]
        if i.type != "f32":
            return self._assign(i, lambda s: COMPARE[name](a(s), b(s)))

        def compare(s):
            unordered = np.isnan(a(s)) | np.isnan(b(s))
            if name in ("num", "nan"):
                return unordered == (name == "nan")
            holds = COMPARE[name[:2]](a(s), b(s))
            return holds | unordered if name[2:] == "u" else holds & ~unordered

        return self._assign(i, compare)

    def _cvt(self, i):
        target, source = i.name[-2:]
        narrow = {"f16": to_half, "bf16": to_bfloat16}
        operands = self._sources(i, {"f16": "u16", "bf16": "u16"}.get(source, source))
        rounding = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(i.name[1])
        if target.endswith("x2"):
            high, low = operands
            pack = narrow[target[:-2]]
            return self._assign(i, lambda s: (pack(high(s)).astype(np.uint32) << 16) | pack(low(s)))
        read = operands[0]
        if target in narrow:
            return self._assign(i, lambda s: narrow[target](read(s)))
        if target == "f32":
            if source == "f16":
                return self._assign(i, lambda s: read(s).view(np.float16).astype(np.float32))
            if source == "bf16":
                return self._assign(i, lambda s: read(s).astype(np.uint32) << 16)
            if source == "f32":
                return self._assign(i, lambda s: rounding(read(s)))
            return self._assign(i, lambda s: read(s).astype(np.float32))
        dtype = integer_type(target)
        if source == "f32":
            limits = np.iinfo(dtype)

            def to_integer(s):
                values = np.nan_to_num(rounding(read(s).astype(np.float64)))
                return np.clip(values, limits.min, limits.max).astype(dtype)

            return self._assign(i, to_integer)
        return self._assign(i, lambda s: read(s).astype(dtype))

    def _mov(self, i):
        if i.type == "pred":
            return self._operation(i, lambda a: a)
        width = width_of(i.type)
        if i.arguments[0].startswith("{"):
            return self._unpack(i, width)
        if not i.arguments[1].startswith("{"):
            read = self._read(i.arguments[1], width)
            return self._assign(i, read)
        parts = [
            self._read(p, width // len(_vector(i.arguments[1]))) for p in _vector(i.arguments[1])
        ]
        part = width // len(parts)

        def pack(s):
            result = np.zeros(self.threads, UNSIGNED[width])
            for k, read in enumerate(parts):
                result |= read(s).astype(UNSIGNED[width]) << UNSIGNED[width](k * part)
            return result

        return self._assign(i, pack)

    def _unpack(self, i, width):
        names = _vector(i.arguments[0])
        part, read = width // len(names), self._read(i.arguments[1], width)

        def step(s):
            for k, name in enumerate(names):
                if name != "_":
                    s.set(name, (read(s) >> UNSIGNED[width](k * part)).astype(UNSIGNED[part]))

        return step

    # Memory.

    def _address(self, operand, width):
        match = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\d+))?\s*\]$", operand)
        read, offset = self._read(match.group(1), width), int(match.group(2) or 0)
        return lambda s: read(s).astype(np.int64) + offset

    def _ld(self, i):
        if i.name[1] == "param":
            name = i.arguments[1].strip("[] ")
            return self._assign(i, lambda s: s.parameters[name])
        return self._load(i, i.arguments[0], i.arguments[1])

    def _load(self, i, destination, address):
        shared = _is_shared(i)
        names, width = _vector(destination), width_of(i.type)
        size, place = len(names) * width // 8, self._address(address, 32 if shared else 64)

        def step(s):
            load = s.view.load_shared if shared else s.view.load
            found = load(place(s), size, s.active(i.predicate), i.line)
            for k, name in enumerate(names):
                part = found[:, k * width // 8 : (k + 1) * width // 8]
                value = np.ascontiguousarray(part).view(UNSIGNED[width]).reshape(-1)
                s.set(name, value.astype(UNSIGNED[max(16, width)]), i.predicate)

        return step

    def _st(self, i):
        shared = _is_shared(i)
        width = width_of(i.type)
        sources = [self._read(operand, width) for operand in _vector(i.arguments[1])]
        size = len(sources) * width // 8
        place = self._address(i.arguments[0], 32 if shared else 64)

        def step(s):
            store = s.view.store_shared if shared else s.view.store
            parts = [np.ascontiguousarray(read(s)).view(np.uint8) for read in sources]
            values = np.concatenate([part.reshape(self.threads, -1) for part in parts], 1)
            store(place(s), values, size, s.active(i.predicate), i.line)

        return step

    def _atom(self, i):
        order = {"relaxed": "", "acquire": "a", "release": "r", "acq_rel": "ar"}.get(i.name[3])
        if [*i.name[1:3], *i.name[4:]] != ["global", "gpu", "add", "u64"] or order is None:
            raise Fault(f"unknown instruction: {i.line}")
        place, value = self._address(i.arguments[1], 64), self._read(i.arguments[2], 64)

        def add(s):
            active = s.active(i.predicate)
            return s.view.atomic_add(place(s), value(s), active, "a" in order, "r" in order, i.line)

        return self._assign(i, add)

    def _ldmatrix(self, i):
        names = _vector(i.arguments[0])
        place = self._matrix_rows(i, i.arguments[1])

        def step(s):
            for k, name in enumerate(names):
                found = s.view.load_shared(place(s, k), 4, s.all, i.line)
                s.set(name, np.ascontiguousarray(found).view(np.uint32).reshape(-1))

        return step

    def _stmatrix(self, i):
        sources = [self._read(operand, 32) for operand in _vector(i.arguments[1])]
        place = self._matrix_rows(i, i.arguments[0])

        def step(s):
            for k, read in enumerate(sources):
                values = np.ascontiguousarray(read(s)).view(np.uint8).reshape(-1, 4)
                s.view.store_shared(place(s, k), values, 4, s.active(i.predicate), i.line)

        return step

    def _matrix_rows(self, i, address):
        """Return a function of a State and k: where each lane's part of the k-th matrix lies."""
        if "trans" in i.name or "m8n8" not in i.name or i.type != "b16":
            raise Fault(f"unknown instruction: {i.line}")
        read, lane = self._address(address, 32), np.arange(32)

        def place(s, k):
            rows = read(s).reshape(-1, 32)[:, 8 * k : 8 * k + 8]
            if (rows % 16).any():
                raise Fault(f"misaligned row of a matrix: {i.line}")
            return (rows[:, lane // 4] + lane % 4 * 4).reshape(-1)

        return place

    # Threads together.

    def _redux(self, i):
        function = {"min": np.min, "max": np.max}[i.name[2]]
        return self._operation(
            i,
            lambda value, _: np.repeat(function(value.reshape(-1, 32), axis=1), 32).astype(
                value.dtype
            ),
        )

    def _shfl(self, i):
        destination, value, by, clamp, members = i.arguments
        if i.name[2] not in ("bfly", "idx") or clamp != "31" or members not in ("-1", "0xffffffff"):
            raise Fault(f"unknown instruction: {i.line}")
        read, lane = self._read(value, 32), np.arange(self.threads)
        number = self._read(by, 32)

        def step(s):
            lanes = number(s).astype(np.int64) & 31
            source = lane ^ lanes if i.name[2] == "bfly" else (lane & ~31) | lanes
            s.set(destination.split("|")[0], read(s)[source], i.predicate)

        return step

    def _bar(self, i):
        if i.name[1] == "warp":
            return lambda s: None  # a warp is in step
        if i.name[1] != "sync" or i.arguments != ["0"]:
            raise Fault(f"unknown instruction: {i.line}")
        return lambda s: s.view.barrier()

    _barrier = _bar

    def _bra(self, i):
        target = i.arguments[0]

        def step(s):
            active = s.active(i.predicate)
            if active.all():
                s.at = self.labels[target]
            elif active.any():
                raise Fault(f"threads take different branches: {i.line}")

        return step

    def _ret(self, i):
        def step(s):
            s.at = len(self.steps)

        return step


def _vector(operand):
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _is_shared(i):
    if i.name[1] == "global" and set(i.name[2:-1]) <= {"v2", "v4"}:
        return False
    if i.name[1].startswith("shared"):
        return True
    raise Fault(f"unknown instruction: {i.line}")
