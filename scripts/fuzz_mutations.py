"""Damaged and hostile inputs for `scripts/fuzz.py`, each a function of a random generator."""

import copy
import io
import json
import math
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, -(2**63), 2**70,
    0.0, -0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf,
    "", "a", "mlp", "x" * 5000, "\x1b[2J\x07", "\0", "../../etc/passwd", "/dev/zero", "ünïcode",
    "${oc.env:HOME}", "${seed}", "${", "???", "os.system", "_target_", "null", "1e9", "*", "[",
    [], {}, [[1]], [None], ["a", 1], {"a": {"b": []}}, {"_target_": "os.system", "x": "true"},
    [10**6] * 3, [1] * 2000, (1, 2), {"params": "*", "lr": math.nan}, {1: 2}, [{}], [{"name": 3}],
    ["os", "subprocess"], {"name": "sgd"}, [{"params": ["*"], "name": "newton"}],
    torch.tensor(1.0), torch.ones(3), torch.ones(0), torch.ones(2, 2, dtype=torch.int64),
    torch.full((4,), math.nan), torch.zeros(5056, dtype=torch.uint8),
    torch.ones(2, dtype=torch.bool), torch.ones(1, dtype=torch.float64), torch.ones(1).expand(9),
    torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse(),
    torch.nn.Parameter(torch.ones(1)),
    torch.float32, torch.Size([1]), {1, 2}, b"bytes", bytearray(3), complex(1, 2),
)  # fmt: skip

Rng = random.Random
Mutation = Callable[[Rng, bytes], bytes]


# ---------------------------------------------------------------- fields of a checkpoint


def fields(rng: Rng, data: bytes) -> bytes:
    """Other values, keys or types in one to three places of a checkpoint."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change(rng, content)
    return saved(content)


def config_fields(rng: Rng, data: bytes) -> bytes:
    """The same, in the config within a checkpoint."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(rng.choice((1, 1, 2))):
        change(rng, content["config"])
    return saved(content)


def nested(rng: Rng, data: bytes) -> bytes:
    """Values that are deep, or that name one thing so often that it is huge when followed."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    value: Any = rng.choice(("end", 0, torch.ones(50)))
    for _ in range(rng.choice((10, 30, 200))):
        shape = rng.randrange(3)
        width = rng.choice((1, 2, 10))
        value = [value] * width if shape else {"a": value, "b": value}
    if rng.random() < 0.2:
        value = []
        value.append(value)
    key = rng.choice([*content, "new"])
    if isinstance(content.get(key), dict) and rng.random() < 0.5:
        content[key][rng.choice([*content[key]])] = value
    else:
        content[key] = value
    return saved(content)


def saved(content: Any) -> bytes:
    """The bytes of `torch.save`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def change(rng: Rng, tree: Any) -> None:
    """Change one random place of a tree of dictionaries and lists, in place."""
    places = list(_places(tree))
    holder, key = rng.choice(places)
    action = rng.randrange(8)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(("extra", "_target_", 3, "__class__", "../x"))] = _nasty(rng)
    elif action == 2:
        other, other_key = rng.choice(places)
        holder[key] = copy.deepcopy(other[other_key])
    elif action == 3 and isinstance(holder, dict):
        holder[str(key) + rng.choice(("_", " ", "\n"))] = holder.pop(key)
    elif action == 4 and isinstance(holder[key], torch.Tensor) and holder[key].numel():
        value = holder[key]
        flat = value.reshape(-1)
        holder[key] = rng.choice(
            (flat[:1], value.double(), flat, value.unsqueeze(0), value * math.nan)
        )
    elif action == 5 and type(holder[key]) in (int, float):
        number = holder[key]
        holder[key] = rng.choice((-number, number + 1, number * 10**6, float(number), str(number)))
    else:
        holder[key] = _nasty(rng)


def _nasty(rng: Rng) -> Any:
    """A copy, which a further change may alter: the next case finds the value as it was."""
    return copy.deepcopy(rng.choice(NASTY))


def _places(tree: Any) -> Any:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


# ---------------------------------------------------------------- bytes, archives, pickles


def raw(rng: Rng, data: bytes) -> bytes:
    """Cut, flipped, inserted, repeated or overwritten bytes."""
    at = rng.randrange(len(data))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 5, 100))):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[:at] + rng.randbytes(rng.choice((1, 4, 1000))) + data[at:]
    if kind == 3:
        return rng.randbytes(rng.choice((0, 1, 22, 500)))
    if kind == 4:
        return data[:at] + data[at // 2 :]
    length = rng.choice((4, 64, 4096))
    return data[:at] + bytes(length) + data[at + length :]


def archive(rng: Rng, data: bytes) -> bytes:
    """The same members with tricks of the archive: names, sizes, compression, order, bombs."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        members = [(info.filename, source.read(info)) for info in source.infolist()]
    kind = rng.randrange(9)
    at = rng.randrange(len(members))
    name, body = members[at]
    compression = zipfile.ZIP_STORED
    if kind == 0:
        compression = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif kind == 1:
        members[at] = (rng.choice(("../../evil", "/tmp/evil", "", "a\0b", name * 300)), body)
    elif kind == 2:
        members.insert(rng.randrange(len(members)), (name, rng.randbytes(10)))
    elif kind == 3:
        del members[at]
    elif kind == 4:
        members[at] = (name, body[: len(body) // 2] if rng.random() < 0.5 else body * 3)
    elif kind == 5:
        compression = zipfile.ZIP_DEFLATED
        members[at] = (name, bytes(200_000_000))
    elif kind == 6:
        rng.shuffle(members)
    elif kind == 7:
        members.append((members[0][0].split("/")[0] + "/constants.pkl", b"\x80\x02}."))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as target:
        for name, body in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            if rng.random() < 0.05:
                info.external_attr = 0o120777 << 16  # a symbolic link
            target.writestr(info, body)
        target.comment = b"hello" if kind == 8 else b""
    result = bytearray(packed.getvalue())
    if rng.random() < 0.3:  # other sizes, offsets and flags in the list of members
        start = result.rfind(b"PK\1\2") + rng.choice((8, 10, 16, 20, 24, 28, 42))
        result[start : start + 4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1, 77)))
    return bytes(result)


def pickled(rng: Rng, data: bytes) -> bytes:
    """The same archive, its checksums right, with other instructions in its pickle."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    name = next(name for name in members if name.endswith("/data.pkl"))
    body = members[name]
    places = [place for _, _, place in pickletools.genops(body) if place]
    at = rng.choice(places)
    if rng.random() < 0.3:
        damaged = bytearray(body)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(len(body))] = rng.randrange(256)
        body = bytes(damaged)
    elif rng.random() < 0.5:
        body = _other_number(rng, body)
    else:
        body = body[:at] + rng.choice(INSTRUCTIONS) + body[at:]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as target:
        for member, content in members.items():
            target.writestr(member, body if member == name else content)
    return packed.getvalue()


def _other_number(rng: Rng, body: bytes) -> bytes:
    """Another size, stride, offset or anything else that is a number."""
    numbers = [
        (place, {"BININT1": 2, "BININT": 5}[opcode.name])
        for opcode, _, place in pickletools.genops(body)
        if opcode.name in ("BININT1", "BININT")
    ]
    place, length = rng.choice(numbers)
    other = rng.choice((0, 1, -1, 2, 255, 10**6, 2**31 - 1, -(2**31)))
    return body[:place] + b"J" + struct.pack("<i", other) + body[place + length :]


INSTRUCTIONS = (
    b"cos\nsystem\n(S'touch hacked'\ntR0",
    b"cbuiltins\neval\nX\x05\0\0\x001+1+1\x85R0",
    b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x7f\x85R0",  # hundreds of gigabytes
    b"ctorch\nempty\n\x8a\x05\0\0\0\0\x7f\x85R0",
    b"ccollections\nCounter\n)R0",
    b"}r\xff\xff\xff\x7f0",  # a value with a number beyond all others
    b"}q\xff0",
    b"\x96\0\0\0\0\0\0\0\x7f",  # bytes that are not there
    b"X\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"]" * 5000,
    b"(" * 5000,
    b"\x8c\x02os\x8c\x06system\x93",
    b"i os\nsystem\n",
    b"\x82\x01",
    b"h\xff",
    b"0",
    b"2",
    b".",
    b"R",
    b"b",
    b"Q",
    b"t",
    b"u",
    b"\x81",
    b"}\x94",
    b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"ctorch._utils\n_rebuild_qtensor\n",
    b"ctorch\nUntypedStorage\n",
    b"ctorch.storage\n_load_from_bytes\n",
    b"cmetarun.cli.main\nmain\n)R",
)

CHECKPOINT_MUTATIONS: dict[str, Mutation] = {
    "fields": fields,
    "config": config_fields,
    "nested": nested,
    "bytes": raw,
    "archive": archive,
    "pickle": pickled,
}


# ---------------------------------------------------------------- files of a run directory


def text_file(rng: Rng, data: bytes) -> bytes:
    """A YAML, JSON or JSON-lines file, damaged or replaced."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(9)
    if kind == 0:
        return raw(rng, data)
    if kind == 1:
        del lines[at]
    elif kind == 2:
        lines.insert(at, rng.choice(LINES))
    elif kind == 3:
        lines[at] = rng.choice(LINES)
    elif kind == 4:
        key, separator, _ = lines[at].partition(b":")
        value = rng.choice([v for v in NASTY if _is_json(v)])
        lines[at] = key + (separator or b":") + b" " + json.dumps(value).encode()
    elif kind == 5:
        return rng.choice(LINES)
    elif kind == 6:
        return b"[" * rng.choice((10, 3000, 200_000))
    elif kind == 7:
        try:
            tree = json.loads(data)
        except ValueError:
            return bomb(rng)
        if isinstance(tree, dict):
            change(rng, tree)
        return json.dumps(tree, default=str).encode()
    else:
        return bomb(rng)
    return b"\n".join(lines)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def bomb(rng: Rng) -> bytes:
    """YAML that is a billion values when its references are followed."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, rng.choice((3, 9, 12))):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join(lines).encode()


LINES = (
    b"", b"null", b"[]", b"{}", b"42", b'"text"', b"\xff\xfe\0", b"seed: ${oc.env:HOME}",
    b"seed: ${", b"!!python/object/apply:os.system ['touch hacked']", b"? ? ? :", b"*nothing",
    b"a: &a [*a]", b"<<: *x", b"seed: 1\nseed: 2", b"trainer: 3", b"- 1", b'{"step": "x"}',
    b'{"step": 1e400}', b'{"step": null}', b"NaN", b'{"step": 1, "val/mse": "x"}', b"[" * 2000,
    b'{"test": 1, "best": 2}', b'{"status": "completed"}', b'{"attempts": "x"}', b"\t: \t",
)  # fmt: skip


# ---------------------------------------------------------------- command lines

VALUES = (
    "", "null", "true", "false", "0", "1", "-1", "2", "5", "1.5", "-0.5", "1e9", "1e400", "nan",
    "inf", "-inf", "99999999999999999999", "9223372036854775807", "9223372036854775808", "abc",
    "mlp", "conv4", "sgd", "adam", "newton", "mixed", "maml", "anil", "sinusoid", "omniglot",
    "[]", "{}", "[1]", "[[1]]", "[a,b]", "{a:1}", "{a:{b:[1]}}", "[{}]", "[{params:'*',lr:0.1}]",
    "[{params:body.*,lr:nan}]", "[{params:1}]", "[{params:['*'],name:sgd,lr:0.1}]", "[lr]",
    "[{params:'*',name:newton}]", "[{params:[1],name:sgd}]", "[lr,lr]", "[null]", "[1e9]",
    "[100000000]", "[3,3]", "'quoted'", '"a=b"', "a=b", "a,b", "1,2", "range(3)", "choice(1,2)",
    "interval(0,1)", "glob(*)", "${seed}", "${oc.env:HOME}", "${oc.env:NOTHING}", "${x", "$", "\\",
    "${trainer.steps}", "{", "}", "[", "]", "(", "'", '"', "???", "_target_",
    "{_target_:os.system}",
    "../../x", "/", "/dev/null", "~", "ü", "\x1b[2J", "a b", " ", "\n", "cuda", "cuda:7", "cpu",
    "cuda:", "loop", "vmap", "float64", "reverse", "implicit", "evolution", "checkpoint",
    "truncated", "cosine", "parameter", "step", "parameter_step", "per_shot", "skip", "[head.*]",
    "[nothing.*]", "['[']", "val", "train", "test", "1000000000", "x" * 3000,
)  # fmt: skip

EXTRA = (
    "-m", "--multirun", "--cfg", "--cfg=job", "--help", "-h", "--info", "--resolve", "-p", "-c",
    "--run", "--hydra-help", "--config-name=eval", "--config-dir=/", "--config-path=x", "--nothing",
    "-x", "--", "-", "=", "==", "=1", "~", "~algo", "~trainer.steps", "+", "++", "+a=1", "+a.b=1",
    "++seed=x", "+seed=1", "~nothing", "algo@x=maml", "+algo@b=maml", "experiment=demo",
    "experiment=nothing", "+experiment=null", "hydra=null", "hydra.job=1", "hydra.run.dir=",
    "hydra/launcher=nothing", "hydra/sweeper=nothing", "hydra.job.chdir=x", "hydra.mode=x",
    "hydra.verbose=1", "hydra.searchpath=[x]", "hydra.run.dir=null", "hydra.run.dir=[]",
    "+plugins=[nothing]", "+plugins=[1]", "plugins=[os]", "plugins=x", "_schema=train",
    "defaults=1",
    "hydra.output_subdir=x", "hydra.job.name=", "--version", "help", "train", "eval", "\0", "",
)  # fmt: skip


def command(
    rng: Rng,
    keys: dict[str, Sequence[str]],
    head: dict[str, list[str]],
    tail: dict[str, list[str]],
) -> list[str]:
    """Arguments of the command line: settings with odd values, options, damaged words.

    Args:
        keys: the settings of each command.
        head: what each command's settings begin with.
        tail: what they end with; keeps a valid command short.
    """
    name = rng.choices((*keys, "tarin", "", "--x"), (6, 3, 0.1, 0.1, 0.1))[0]
    known = keys.get(name, ["seed"])
    words = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if rng.random() < 0.15:
            words.append(rng.choice(EXTRA))
            continue
        key = rng.choice(known)
        if rng.random() < 0.1:
            key = _misspelt(rng, key)
        word = f"{rng.choice(('', '', '', '', '+', '++'))}{key}={rng.choice(VALUES)}"
        words.append(_misspelt(rng, word) if rng.random() < 0.15 else word)
    words = [word.replace("\0", "") for word in words]  # the system itself refuses these
    return [name, *head.get(name, []), *words, *tail.get(name, [])]


def _misspelt(rng: Rng, word: str) -> str:
    at = rng.randrange(len(word) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + rng.choice("=,.[]{}()'\"$@+~-:/\\ #x") + word[at:]
    if kind == 2:
        return word[:at] + word[at:][::-1]
    return word[:at] + word[:at]
