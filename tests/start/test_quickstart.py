"""The commands of docs/quickstart.md are commands, and what it shows of a run file is one."""

import re
import shlex
from pathlib import Path

from megahybrid.cli import _parser
from megahybrid.config import RunConfig, check_run, parse
from megahybrid.config.yaml_file import parse_yaml

PAGE = (Path(__file__).parents[2] / "docs/quickstart.md").read_text(encoding="utf-8")


def test_every_command_parses() -> None:
    lines = re.findall(r"^\$ megahybrid (.+)$", PAGE, re.MULTILINE)
    lines += re.findall(r"`megahybrid ([^`]+)`", PAGE)
    assert len(lines) > 10
    for line in lines:
        _, rest = _parser().parse_known_args(shlex.split(line)) if "--help" not in line else (0, [])
        assert all("=" in word for word in rest), line


def test_the_run_file_on_the_page_checks_and_has_the_steps_that_the_page_tells() -> None:
    text = PAGE.partition("```yaml\n")[2].partition("```")[0]
    run = parse(RunConfig, parse_yaml(text, "quickstart"))
    check_run(run, 1)
    for stage, steps in zip(run.stages, run.stage_plan.stage_steps, strict=True):
        assert f"stage {stage.name}: {steps:,} steps, {stage.tokens:,} tokens" in PAGE
