"""PTX text to statements: entries, parameters, bodies. Knows nothing of single instructions."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

TYPE_BYTES = {
    "u8": 1, "s8": 1, "b8": 1, "u16": 2, "s16": 2, "b16": 2, "f16": 2, "bf16": 2, "u32": 4, "s32": 4, "b32": 4,
    "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "pred": 4, "u64": 8, "s64": 8, "b64": 8, "f64": 8,
}  # fmt: skip


class RefusedError(Exception):
    """Text that the interpreter does not know, at a line."""

    def __init__(self, detail: str, line: int | None = None):
        super().__init__(detail)
        self.detail = detail
        self.line = line


@dataclass
class Parameter:
    """A kernel parameter: a scalar, or a struct by value (type b8)."""

    name: str
    type: str
    offset: int  # in the parameter space
    size: int


@dataclass
class SharedVariable:
    name: str
    alignment: int
    size: int | None  # None: the dynamic shared memory


@dataclass
class Statement:
    """One of: scope braces (text "{" or "}"), a label (text "name:"), a directive, an instruction."""

    text: str
    line: int  # of the whole PTX text, from 1


@dataclass
class Entry:
    name: str
    parameters: list[Parameter]
    max_threads: int | None  # of a block
    exact_threads: bool  # max_threads is the only number allowed
    statements: list[Statement]
    module_shared: list[SharedVariable] = field(default_factory=list)


_SHARED = re.compile(r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*;")
_STATEMENT = re.compile(
    r"""\s*(?:
        (?P<brace>[{}])
      | (?P<label>[\w$]+\s*:)(?!:)
      | (?P<line_directive>\.(?:loc|file)\b[^\n]*)
      | (?P<text>[^;{}][^;]*);
    )""",
    re.X,
)


@dataclass(frozen=True)
class KernelText:
    """An entry that is not taken apart yet, without comments."""

    header: str  # what lies between its name and its body
    body: str
    line: int  # where the body begins


@dataclass(frozen=True)
class Module:
    """PTX text, whose kernels are told apart once, since there may be many."""

    kernels: dict[str, KernelText]  # by mangled name
    shared: list[SharedVariable]  # of all of them


@functools.lru_cache(maxsize=16)
def module(ptx: str) -> Module:
    text = _without_comments(ptx)
    kernels, outside, position, line = {}, [], 0, 1
    for match in re.finditer(r"\.entry\s+([\w$]+)", text):
        opening = text.index("{", match.end())
        end = _closing_brace(text, opening)
        line += text.count("\n", position, opening)
        kernels[match.group(1)] = KernelText(text[match.end() : opening], text[opening + 1 : end], line)
        outside.append(text[position : match.start()])
        line += text.count("\n", opening, end)
        position = end + 1
    outside.append(text[position:])
    shared = map(shared_variable, _SHARED.findall(_outside_bodies("".join(outside))))
    return Module(kernels, [variable for variable in shared if variable])


def entry(ptx: str, name: str | None) -> Entry:
    """The kernel whose mangled name is `name` or alone contains it; with None the only kernel."""
    found = module(ptx)
    matching = [name] if name in found.kernels else [n for n in found.kernels if name is None or name in n]
    if len(matching) != 1:
        raise RefusedError(f"{len(matching)} kernels match {name!r} among {sorted(found.kernels)}")
    kernel = found.kernels[matching[0]]
    threads = re.search(r"\.(reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", kernel.header)
    max_threads = None
    if threads:
        max_threads = int(threads.group(2)) * int(threads.group(3) or 1) * int(threads.group(4) or 1)
    return Entry(
        matching[0],
        _parameters(kernel.header),
        max_threads,
        threads is not None and threads.group(1) == "reqntid",
        list(_statements(kernel.body, kernel.line)),
        found.shared,
    )


def shared_variable(statement: str | tuple[str, ...]) -> SharedVariable | None:
    """The variable of a `.shared` directive (its text without the semicolon, or the groups of the pattern)."""
    if isinstance(statement, str):
        match = _SHARED.fullmatch(statement + ";")
        if match is None:
            return None
        statement = match.groups(default="")
    extern, alignment, type_, name, count = statement
    bytes_each = TYPE_BYTES[type_]
    size = None if extern else bytes_each * int(count or 1)
    return SharedVariable(name, int(alignment or bytes_each), size)


def split_operands(text: str) -> list[str]:
    """At the commas that are not inside braces or brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        parts.append(current.strip())
    return parts


def _without_comments(ptx: str) -> str:
    """Keeps the line breaks."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), ptx, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise RefusedError("a kernel's body does not end")


def _outside_bodies(text: str) -> str:
    """Module scope: without the bodies of other kernels, whose shared variables are their own."""
    kept, position = [], 0
    while (opening := text.find("{", position)) >= 0:
        kept.append(text[position:opening])
        position = _closing_brace(text, opening) + 1
    return "".join([*kept, text[position:]])


def _parameters(header: str) -> list[Parameter]:
    inside = header[header.find("(") + 1 : header.rfind(")")] if "(" in header else ""
    parameters, offset = [], 0
    for declaration in filter(None, (part.strip() for part in inside.split(","))):
        match = re.fullmatch(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
            r"([\w$]+)\s*(?:\[(\d+)\])?",
            declaration,
        )
        if match is None or match.group(2) not in TYPE_BYTES:
            raise RefusedError(f"parameter {declaration!r}")
        alignment, type_, name, count = match.groups()
        size = TYPE_BYTES[type_] * int(count or 1)
        alignment = int(alignment or TYPE_BYTES[type_])
        offset = -(-offset // alignment) * alignment
        parameters.append(Parameter(name, type_, offset, size))
        offset += size
    return parameters


def _statements(body: str, line: int) -> Iterator[Statement]:
    """`line`: of the first one."""
    position = 0
    while match := _STATEMENT.match(body, position):
        kind = match.lastgroup
        assert kind is not None
        start = match.start(kind)
        line += body.count("\n", position, start)
        if kind != "line_directive":
            yield Statement(" ".join(match.group(kind).split()), line)
        line += body.count("\n", start, match.end())
        position = match.end()
    if rest := body[position:].strip():
        raise RefusedError(f"{rest[:80]!r}", line + body.count("\n", position, body.index(rest, position)))
