"""A run in which every text that a file can carry tries to be more than text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.report.synthetic_answers import write_answers
from tests.report.synthetic_run import write_run

# Each sets window.pwned when a browser takes it for what it says.
ATTACKS = {
    "element": "<img src=x onerror=window.pwned=1>",
    "script": "</script><script>window.pwned=1</script>",
    "comment": "<!--<script>",
    "attribute": '"onmouseover="window.pwned=1" autofocus onfocus="window.pwned=1" x="',
    "single": "'onmouseover='window.pwned=1' x='",
    "link": '<a href="javascript:window.pwned=1" target="_self">link</a>',
    "svg": "<svg/onload=window.pwned=1>",
    "closing": "</pre></td></title></style><iframe srcdoc='<script>parent.pwned=1</script>'>",
    "template": "{{ self.__init__.__globals__ }}{% raw %}${window.pwned=1}$title",
    "plotly": '<b>bold</b><a href="https://evil.example">x</a>%{x}%{customdata[0]}',
    "formula": r"$\frac{1}{$ \usepackage $$ _hidden",
    "controls": "a\0b\x1b[31mc\x07d\x9b2Je\x7f\r\nf\x0b",
    "direction": "\u202egnp.exe\u202c \u2066x\u2069 \u200frtl",
    "separators": "a\u2028b\u2029c\ufeffd\ufffe",
    "half": "\ud800 and \udfff",
    "prototype": "__proto__",
    "empty": "",
}
LONG = "<img src=x onerror=window.pwned=1>" * 31_000  # a little more than a megabyte

Change = Callable[[str], str]


def write_hostile_run(directory: Path, attack: str) -> Path:
    """A run whose every free text is `attack`, told apart where texts must differ."""
    run = write_answers(write_run(directory, crash_at=80, sampled=True))
    ledger = run / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    lines += [
        event("warning", lines[-1], {"message": attack, attack: attack}),
        event("evaluate", lines[-1], evaluation(attack)),
        event(attack, lines[-1], {"x": attack}),
        event("gate", lines[-1], {"gate": attack, "value": 1.0, "bound": attack, "ok": False}),
        event("start", {**lines[-1], "attempt": 2}, {"device": attack, attack: {attack: [attack]}}),
        event("end", {**lines[-1], "attempt": 2}, {"outcome": attack}),
    ]
    names = Names(attack)
    ledger.write_text("".join(json.dumps(names.told(line)) + "\n" for line in lines))
    for path in (run / "evaluations").iterdir():
        path.write_text(json.dumps(names.told(json.loads(path.read_text()))))
        kind = path.name.split(".")[1]
        safe = attack.replace("/", "∕").replace("\0", "").encode("utf-8", "ignore")[:150].decode(
            "utf-8", "ignore"
        )  # fmt: skip
        path.rename(path.with_name(f"{path.name.split('.')[0]}.{kind}.{safe}x.json"))
    (run / "samples.txt").write_bytes(attack.encode("utf-8", "surrogatepass"))
    return run


def event(name: str, like: dict[str, Any], detail: dict[str, Any]) -> dict[str, Any]:
    return {**like, "kind": "event", "event": name, "detail": detail}


def evaluation(attack: str) -> dict[str, Any]:
    bucket = {"start": 0, "stop": 8, "tokens": 300, "loss": 2.0}
    return {"set": attack, "rows": attack, "stage": attack, "length": 8, "loss": 2.0,
            "tokens": 300, "by_position": [bucket]}  # fmt: skip


class Names:
    """Puts the attack in place of every name that a file carries, each still its own."""

    fields = ("stage", "set", "task", "haystack", "variant", "alias", "device", "precision")
    mappings = ("source_tokens", "by_kind", "gradient_norm_by_kind", "tasks", "results", "sliding")

    def __init__(self, attack: str) -> None:
        self.attack = attack

    def told(self, value: Any, field: str = "") -> Any:
        if isinstance(value, dict):
            renamed = field in self.mappings
            return {
                self.name(key) if renamed else key: self.told(one, key)
                for key, one in value.items()
            }
        if isinstance(value, list):
            return [self.told(one) for one in value]
        named = field in self.fields or (field == "kind" and value in ("local", "global"))
        return self.name(value) if named and isinstance(value, str) else value

    def name(self, plain: str) -> str:
        return f"{self.attack}{plain}"
