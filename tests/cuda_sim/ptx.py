"""PTX, as nvcc writes it for the kernels of csrc/cuda, as C++ for the simulator: one function per kernel.

Every instruction becomes a call of the function of its name in ptx_ops.h, every register a variable, every label a
label. A kernel's shared variables lie before its dynamic shared memory, as on the device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

REGISTER = {"pred": "bool", "b16": "b16", "b32": "b32", "f32": "b32", "b64": "b64", "f64": "b64"}
SPECIAL = {"%tid.x": "threadIdx.x", "%ctaid.x": "blockIdx.x", "%ntid.x": "blockDim.x", "%nctaid.x": "gridDim.x"}
BYTES = {
    "u8": 1,
    "s8": 1,
    "b8": 1,
    "u16": 2,
    "b16": 2,
    "u32": 4,
    "s32": 4,
    "b32": 4,
    "f32": 4,
    "u64": 8,
    "s64": 8,
    "b64": 8,
    "f64": 8,
}
NO_RESULT = ("bar.sync", "bar.warp.sync", "cp.async.cg.shared.global", "cp.async.wait_all", "membar.gl")
ENTRY = re.compile(r"\.visible \.entry (\w+)\(\s*\.param[^\n]*?(\w+)\[\d+\]\s*\)(.*?)\n\{\n(.*?)\n\}\n", re.S)
NAME = re.compile(r"_ZN9tokenpool4cuda\d+(\w+?)_kernel(?:I(f|6__half|13__nv_bfloat16|t|j)E)?")
TYPES = {"f": "float", "6__half": "__half", "13__nv_bfloat16": "__nv_bfloat16", "t": "uint16_t", "j": "uint32_t"}


class Listing:
    """Of kernels that count what they execute (count.h): every instruction's kernel, basic block, opcode and place,
    which is the "file:line" of each call that was inlined on the way to it and its own."""

    def __init__(self) -> None:
        self.instructions: list[tuple[str, int, str, list[str]]] = []
        self.blocks = 0


def kernels(text: str, listing: Listing | None = None) -> Iterator[Kernel]:
    """Every kernel of a PTX file. With a `listing` (filled here) each counts what it executes; lines: nvcc
    -lineinfo."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]*)"', text, re.M))
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*(\.loc\s[^\n]*)", r"\1;", text, flags=re.M)
    for symbol, parameter, _, body in ENTRY.findall(text):
        found = NAME.match(symbol)
        yield Kernel(found[1] + (f"_{TYPES[found[2]]}" if found[2] else ""), parameter, body, files, listing)


def _split(operands: str) -> list[str]:
    """Operands at the commas outside braces and brackets."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)]


class Kernel:
    """`name` (gram_kernel<float>: gram_float) and `text` (its definition in C++)."""

    def __init__(self, name: str, parameter: str, body: str, files: dict[str, str], listing: Listing | None):
        self.name, self.parameter, self.symbols, self.registers, self.lines = name, parameter, {}, set(), []
        self.files, self.listing, self.starts_block = files, listing, True
        self.place: list[str] = []
        self.calls: dict[str, list[str]] = {}  # where a line that calls lies, by its .loc
        shared = 0
        for align, kind, symbol, count in re.findall(r"\.shared \.align (\d+) \.(\w+) ([\w$]+)(?:\[(\d+)\])?;", body):
            shared = -(-shared // int(align)) * int(align)
            self.symbols[symbol] = shared
            shared += BYTES[kind] * int(count or 1)
        self.dynamic = -(-shared // 16) * 16
        body = re.sub(r"\.shared [^;]*;", "", body)
        for label, statement in re.findall(r"\s*(?:(\$\w+):|([{}]|[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*;))", body):
            self.lines.append(f"{label.replace('$', '_')}:;" if label else self.statement(statement))
            self.starts_block |= bool(label)
        lines = "\n  ".join(line for line in self.lines if line)
        self.text = (
            f"static void run_{name}(const void* parameters) {{\n  {lines}\n}}\n"
            f"extern const Kernel {name}{{run_{name}, {self.dynamic}}};\n"
        )

    def statement(self, text: str) -> str:
        if text in ("{", "}"):
            return text
        text = " ".join(text.rstrip(";").split())
        if text.startswith(".reg"):
            kind, register, _, count = re.fullmatch(r"\.reg \.(\w+) %(\w+)(<(\d+)>)?", text).groups()
            names = [f"{register}{i}" for i in range(int(count))] if count else [register]
            self.registers.update(names)
            return f"{REGISTER[kind]} {', '.join(names)};"
        if text.startswith(".loc"):
            at, _, caller = text.removeprefix(".loc ").partition(", function_name")
            caller = caller.rpartition("inlined_at ")[2]
            calls = self.calls.get(caller, [self.line(caller)]) if caller else []
            self.place = self.calls[at] = [*calls, self.line(at)]
            return ""
        if text.startswith(".pragma") or not text:
            return ""
        guard, opcode, operands = re.fullmatch(r"(@!?%\w+ )?([\w.:]+)(?: (.*))?", text).groups()
        start = self.counted(opcode) if self.listing else ""
        done = self.instruction(opcode, _split(operands or ""))
        if guard:
            done = f"if ({guard.strip()[1:].replace('%', '')}) {{ {done} }}"
        return start + done

    def line(self, at: str) -> str:
        file, line, _ = at.split()
        return f"{self.files[file].rsplit('/', 1)[-1]}:{line}"

    def counted(self, opcode: str) -> str:
        start = ""
        if self.starts_block:
            start = f"count_block({self.listing.blocks}); "
            self.listing.blocks += 1
        self.starts_block = opcode.startswith(("bra", "ret"))
        self.listing.instructions.append((self.name, self.listing.blocks - 1, opcode, self.place))
        return start

    def instruction(self, opcode: str, operands: list[str]) -> str:
        parts = opcode.split(".")
        if opcode in ("ret", "exit"):
            return "return;"
        if parts[0] == "bra":
            return f"goto {operands[0].replace('$', '_')};"
        if parts[0] in ("ld", "st"):
            return self.memory(parts, operands)
        call = opcode.replace(".", "_").replace("::", "_")
        if opcode in NO_RESULT:
            seen = ""
            if self.listing and opcode.startswith("cp.async.cg"):
                seen = self.seen(f"global_at({self.value(operands[1])}, 16)", 16, False) + "; "
            return f"{seen}{call}({', '.join(self.value(o) for o in operands)});"
        if parts[0] in ("mma", "ldmatrix"):
            results = operands[0].strip("{}").split(",")
            given = [self.vector(o) if o.startswith("{") else self.value(o) for o in operands[1:]]
            seen = ""
            if self.listing and parts[0] == "ldmatrix":
                seen = self.seen(f"shared_at({given[0]}, 16)", 16, True) + "; "
            return (
                f"{{ {seen}const auto out = {call}({', '.join(given)}); "
                + " ".join(f"{self.value(r.strip())} = out[{i}];" for i, r in enumerate(results))
                + " }"
            )
        target = operands[0]
        if opcode == "mov.b32" and operands[1].startswith("{"):
            return f"{self.value(target)} = pack({self.vector(operands[1]).strip('{}')});"
        given = [self.value(o) for o in operands[1:]]
        if parts[0] == "shfl":
            result, _, taken = target.partition("|")
            return (
                f"{{ bool in_range; {self.value(result)} = {call}(&in_range, {', '.join(given)});"
                + (f" {self.value(taken)} = in_range;" if taken else "")
                + " }"
            )
        if opcode == "mov.b32" and target.startswith("{"):  # two halves
            low, high = (t.strip() for t in target.strip("{}").split(","))
            return (
                f"{{ const b32 both = {given[0]}; "
                + (f"{self.value(low)} = static_cast<b16>(both); " if low != "_" else "")
                + (f"{self.value(high)} = static_cast<b16>(both >> 16); " if high != "_" else "")
                + "}"
            )
        return f"{self.value(target)} = {call}({', '.join(given)});"

    def memory(self, parts: list[str], operands: list[str]) -> str:
        kind, space = parts[-1], parts[1] if parts[1] in ("param", "shared", "global") else "generic"
        count = next((int(p[1:]) for p in parts if p in ("v2", "v4")), 1)
        address, registers = (operands[1], operands[0]) if parts[0] == "ld" else (operands[0], operands[1])
        names = [r.strip() for r in registers.strip("{}").split(",")]
        where, size = self.value(address), BYTES[kind]
        memory = {"param": "parameter_at", "shared": "shared_at"}.get(space, "global_at") + f"({where}, {size * count})"
        if space != "param":
            memory = self.seen(memory, size * count, space == "shared")
        width = {1: "uint8_t", 2: "b16", 4: "b32", 8: "b64"}[size]
        if kind in ("s8", "s16"):
            raise NotImplementedError(f"{'.'.join(parts)}: sign extension")
        if parts[0] == "ld":
            moves = " ".join(f"{self.value(n)} = load<{width}>(at + {size * i});" for i, n in enumerate(names))
            return f"{{ const unsigned char* at = {memory}; {moves} }}"
        moves = " ".join(f"store(at + {size * i}, static_cast<{width}>({self.value(n)}));" for i, n in enumerate(names))
        return f"{{ unsigned char* at = {memory}; {moves} }}"

    def seen(self, memory: str, size: int, shared: bool) -> str:
        """An access, counted if this kernel counts."""
        return (
            f"count_access({len(self.listing.instructions) - 1}, {memory}, {size}, {int(shared)})"
            if self.listing
            else memory
        )

    def vector(self, operand: str) -> str:
        return "{" + ", ".join(self.value(o.strip()) for o in operand.strip("{}").split(",")) + "}"

    def value(self, operand: str) -> str:
        if operand.startswith("["):
            base, _, offset = operand.strip("[]").partition("+")
            return f"{self.value(base)} + ({offset})" if offset else self.value(base)
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand.startswith("%") and operand[1:] in self.registers:
            return operand[1:]
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", operand):
            return f"0x{operand[2:]}u"
        if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", operand):
            return f"0x{operand[2:]}ull"
        if operand == self.parameter:
            return "reinterpret_cast<b64>(parameters)"
        if operand in self.symbols:
            return f"{self.symbols[operand]}u"
        if operand.endswith("6memoryE"):
            return f"{self.dynamic}u"
        if re.fullmatch(r"-?\d+U?", operand):
            return operand + ("ll" if abs(int(operand.rstrip("U"))) > 0x7FFFFFFF else "")
        raise NotImplementedError(f"operand {operand!r}")
