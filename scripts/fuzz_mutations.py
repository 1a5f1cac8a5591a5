"""Damaged and hostile inputs for `scripts/fuzz.py`, each a function of a random generator."""

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from metarun.rundir import checkpoint
from metarun.system import archive

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, -(2**63), 2**70,
    0.0, -0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf,
    "", "a", "mlp", "x" * 5000, "\x1b[2J\x07", "\0", "../../etc/passwd", "/dev/zero", "ünïcode",
    "${oc.env:HOME}", "${seed}", "${", "???", "os.system", "_target_", "null", "1e9", "*", "[",
    [], {}, [[1]], [None], ["a", 1], {"a": {"b": []}}, {"_target_": "os.system", "x": "true"},
    [10**6] * 3, [1] * 2000, {"params": "*", "lr": math.nan}, {"1": 2}, [{}], [{"name": 3}],
    ["os", "subprocess"], {"name": "sgd"}, [{"params": ["*"], "name": "newton"}],
    torch.tensor(1.0), torch.ones(3), torch.ones(0), torch.ones(2, 2, dtype=torch.int64),
    torch.full((4,), math.nan), torch.zeros(5056, dtype=torch.uint8),
    torch.ones(2, dtype=torch.bool), torch.ones(1, dtype=torch.float64), torch.ones(1).expand(9),
    torch.ones(2, dtype=torch.complex64), torch.ones(3, dtype=torch.complex128), 10**400,
)  # fmt: skip

Rng = random.Random
Mutation = Callable[[Rng, bytes], bytes]


# ---------------------------------------------------------------- fields of a checkpoint


def fields(rng: Rng, data: bytes) -> bytes:
    """Other values, keys or types in one to three places of a checkpoint."""
    content = archive.from_bytes(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change(rng, content)
    return saved(content)


def config_fields(rng: Rng, data: bytes) -> bytes:
    """The same, in the config within a checkpoint."""
    content = archive.from_bytes(data)
    for _ in range(rng.choice((1, 1, 2))):
        change(rng, content["config"])
    return saved(content)


def nested(rng: Rng, data: bytes) -> bytes:
    """Values that are deep, or many."""
    content = archive.from_bytes(data)
    value: Any = rng.choice(("end", 0, torch.ones(50)))
    for _ in range(rng.choice((10, 30, 200))):
        value = [value] if rng.randrange(2) else {"a": value}
    if rng.random() < 0.3:
        value = [rng.choice((0, [], {}, ""))] * rng.choice((1000, 10**5, 10**6))
    key = rng.choice([*content, "new"])
    if isinstance(content.get(key), dict) and content[key] and rng.random() < 0.5:
        content[key][rng.choice([*content[key]])] = value
    else:
        content[key] = value
    return saved(content)


def saved(content: Any) -> bytes:
    """The bytes of a checkpoint, right or wrong."""
    return archive.to_bytes(content, checkpoint.BY_OWN_NAME)


def change(rng: Rng, tree: Any) -> None:
    """Change one random place of a tree of dictionaries and lists, in place."""
    places = list(_places(tree))
    holder, key = rng.choice(places)
    action = rng.randrange(8)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(("extra", "_target_", "3", "__class__", "../x"))] = _nasty(rng)
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


# ---------------------------------------------------------------- bytes, headers


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


def header(rng: Rng, data: bytes) -> bytes:
    """Other types, shapes, places and names of the tensors, with a digest that is right."""
    tensors, fields, body = opened(data)
    name = rng.choice([*tensors])
    own = tensors[name]
    number = rng.choice((0, 1, -1, 3, 10**6, 2**31, 2**63, 2**64, 10**30, 0.5, None, "1"))
    kind = rng.randrange(9)
    if kind == 0:
        own["dtype"] = rng.choice(("F64", "F16", "U8", "BOOL", "C64", "F8_E4M3", "X", "", 3, None))
    elif kind == 1:
        own["shape"] = rng.choice(([], [number], [number, number], [1] * 1000, [0], number))
    elif kind == 2:
        own["data_offsets"][rng.randrange(2)] = number
    elif kind == 3:
        own["data_offsets"] = rng.choice(([], [0], [0, len(body)], [4, 0], [0, 4, 8], number))
    elif kind == 4:
        tensors[rng.choice(("../evil", "", "a" * 10**5, "\0", name + " "))] = tensors.pop(name)
    elif kind == 5:
        del tensors[name]
    elif kind == 6:
        tensors[rng.choice(("extra", "__metadata__ "))] = copy.deepcopy(own)
    elif kind == 7:
        own[rng.choice(("dtype", "shape", "data_offsets", "extra"))] = _nasty_json(rng)
    else:
        body = rng.choice((body[:-1], body + b"x", b"", body * 2))
    return sealed(tensors, fields, body)


def places(rng: Rng, data: bytes) -> bytes:
    """Another word on which tensor belongs where, with a digest that is right."""
    tensors, fields, body = opened(data)
    table = fields["tensors"]
    at, other = rng.randrange(len(table)), rng.randrange(len(table))
    kind = rng.randrange(8)
    if kind == 0:
        table[at][0] = rng.choice(([], ["step"], ["meta"], ["new", "new"], [0], ["meta", 0], [[]]))
    elif kind == 1:
        table[at][1] = rng.choice(("nothing", "", 3, None, [], table[other][1]))
    elif kind == 2:
        table[at] = rng.choice(([], None, "xy", [[], []], {"a": 1}, table[other]))
    elif kind == 3:
        del table[at]
    elif kind == 4:
        fields["complex"] = rng.choice((None, [table[at][1]], [3, []], {}, "x", [10**5 * "a"]))
    elif kind == 5:
        fields[rng.choice((*fields,))] = _nasty_json(rng)
    elif kind == 6:
        fields["values"] = _nasty_json(rng)
    else:
        change(rng, fields)
    return sealed(tensors, {k: v for k, v in fields.items() if k != "sha256"}, body)


def text(rng: Rng, data: bytes) -> bytes:
    """Other characters in the JSON of the values, with a digest that is right."""
    tensors, fields, body = opened(data)
    words = json.dumps({"sha256": MARK, **fields})
    at = rng.randrange(80, len(words))
    long = rng.choice((10, 3000, 10**6))
    strange = rng.choice(
        ('"', "{", "]", ",", "\\", "\0", "NaN", "-Infinity", "1e400", "9" * 30, "9" * 5000,
         "[" * long, '{"a":' * long, "[[]," * long, "\\ud800", "é", "//", "null", "true,")
    )  # fmt: skip
    return sealed(tensors, words[:at] + strange + words[at + rng.choice((0, 1, 5)) :], body)


def length(rng: Rng, data: bytes) -> bytes:
    """Another length of the header than it has."""
    size = rng.choice((0, 1, 7, len(data) - 8, len(data), 2**24, 2**31, 2**63, 2**64 - 1))
    return size.to_bytes(8, "little") + data[8:]


MARK = "0123456789abcdef" * 4


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The description of each tensor, the fields of ours without the digest, the tensors' bytes."""
    size = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + size])
    fields = json.loads(tensors.pop("__metadata__")[archive.ENTRY])
    del fields["sha256"]
    return tensors, fields, data[8 + size :]


def sealed(tensors: dict[str, Any], fields: dict[str, Any] | str, body: bytes) -> bytes:
    """A file of these parts with a digest that is right, whatever they are."""
    words = (
        fields if isinstance(fields, str) else json.dumps({"sha256": MARK, **fields}, default=str)
    )
    head = json.dumps({"__metadata__": {archive.ENTRY: words}, **tensors}).encode()
    whole = len(head).to_bytes(8, "little") + head + body
    digest = hashlib.sha256(whole.replace(MARK.encode(), b"0" * 64, 1)).hexdigest()
    return whole.replace(MARK.encode(), digest.encode(), 1)


def _nasty_json(rng: Rng) -> Any:
    return copy.deepcopy(rng.choice([value for value in NASTY if _is_json(value)]))


CHECKPOINT_MUTATIONS: dict[str, Mutation] = {
    "fields": fields,
    "config": config_fields,
    "nested": nested,
    "bytes": raw,
    "header": header,
    "places": places,
    "text": text,
    "length": length,
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
