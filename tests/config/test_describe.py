"""What describe, compare, the summary and the reference say."""

import json
from pathlib import Path

import pytest

from megahybrid.config import RunConfig, load
from megahybrid.config.compare import compare, render_comparison
from megahybrid.config.describe import describe, render
from megahybrid.config.reference import reference
from megahybrid.config.summary import summary
from megahybrid.interop.architectures.table import huggingface_fits
from tests.config.example import example
from tests.config.test_config_files import CONFIGS, RUNS

DOCS = CONFIGS.parent / "docs"


def test_the_description_holds_a_row_per_layer_and_goes_into_json() -> None:
    run = example("stages.1.schemes={local: {window: 128}}")
    description = describe(run, 4)
    assert json.loads(json.dumps(description))["parameters"] == description["parameters"]
    assert [row["window"] for row in description["layers"]] == [128, 128, 128, None] * 2
    assert description["length"] == 4096
    assert description["kv_cache_ratio"] == pytest.approx(0.25 + 0.75 * 128 / 4096)
    assert (description["data_degree"], description["legal_tensor_degrees"]) == (2, [1, 2, 4, 8])
    assert set(description["stages"][0]["memory_per_rank"]) == {0, 1, 2, 3}
    short, long = description["stages"]
    assert [row["length"] for row in long["lengths"]] == [1024, 4096]
    assert short["lengths"][0]["ideal_speedup"] < long["lengths"][1]["ideal_speedup"]
    assert short["flops"] == pytest.approx(short["tokens"] * short["lengths"][0]["flops_per_token"])


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_is_described_within_the_width(path: Path) -> None:
    text = render(describe(load(path), fits=huggingface_fits), width=110)
    assert max(len(line) for line in text.splitlines()) <= 110
    assert "…" not in text
    for part in ("parameters", "legal tensor degrees", "Stages", "Memory per rank", "Cohere2"):
        assert part in text


def test_equal_layers_share_a_row() -> None:
    text = render(describe(example()))
    assert [line.split()[0] for line in text.splitlines() if "local" in line] == ["0-2", "4-6"]


def test_comparing_names_every_difference_and_what_follows_from_it() -> None:
    one = example()
    two = example("model.layer_plan.schemes.local.window=128", "stages.0.lengths={512: 1}")
    rows = {path: (a, b) for path, a, b in compare(one, two)}
    before, after = rows.pop("(training FLOPs)")
    assert before < after
    assert rows == {
        "model.layer_plan.schemes.local.window": (64, 128),
        "stages.0.lengths.256": (1, "absent"),
        "stages.0.lengths.512": ("absent", 1),
    }
    assert compare(one, example()) == []
    assert render_comparison([], "a", "b") == "a and b say the same.\n"
    assert "stages.0.lengths.512" in render_comparison(compare(one, two), "a", "b")


def test_the_summary_is_short() -> None:
    assert summary(example(), 4).splitlines() == [
        "2,033,792 parameters, 8 layers",
        "tensor 2 x data 2 = 4 ranks, ZeRO 1, fp32",
        "stage short: 98 steps, 802,816 tokens, length 256",
        "stage long: 13 steps, 106,496 tokens, lengths 1024 : 4096 at 3 : 1 by sequences",
        "in all 111 steps, 909,312 tokens",
    ]


def test_the_reference_names_every_field_with_a_meaning() -> None:
    text = reference()
    for name in RunConfig.model_fields:
        assert f"| `{name}` |" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(row.rstrip(" |").count(" | ") >= 3 for row in rows), "a field has no description"


def test_the_page_in_docs_is_the_reference() -> None:
    assert (DOCS / "config.md").read_text() == reference(), (
        "run: python -m megahybrid.config.reference > docs/config.md"
    )


def test_context_ranks_are_described_by_length_and_exchange() -> None:
    run = example("parallel={tensor: 1, context: {256: 1, 4096: 8}}", "precision=bf16")
    assert describe(example())["context"] == []
    run = run.model_copy(update={"stages": run.stages[1:]})
    short, long = json.loads(json.dumps(describe(run, 8)))["context"]
    assert (short["degree"], long["degree"], long["layout"]) == (8, 8, "contiguous")
    local, full = long["schemes"]
    assert (local["exchange"], full["exchange"], local["layers"]) == ("halo", "heads", 6)
    # Two rows of 4,096 tokens: a halo of 63 keys and values of two heads; 2 (8/8 + 1) of heads.
    assert long["rows_per_step"] == 2
    assert local["bytes_per_step"] == 2 * 6 * (4 * 63 * 2 * 16 * 2)
    assert full["bytes_per_step"] == 2 * 2 * (2 * 3584 * 16 * 2 * (2 + 2))
    assert long["legal_degrees"][:4] == [1, 2, 4, 8]
    assert long["legal_degrees_heads"] == [1, 2, 4, 8]
    assert full["work_max_over_mean"] == 1 < local["work_max_over_mean"] < 1.2
    # Ten passes over 128 features by 8 tensor ranks, against the exchanges of four layers.
    assert long["period"]["tensor_alone"] == 4 * 10 * 4096 * 128 * 2 * 7 // 8
    assert long["period"]["ours"] == 3 * (4 * 63 * 2 * 32) + 2 * 3584 * 32 * 4


def test_recomputed_attention_repeats_the_forward_share() -> None:
    def received(recompute: str) -> int:
        run = example("parallel.context=2", f"stages.0.recompute={recompute}")
        return sum(s["bytes_per_step"] for s in describe(run, 4)["context"][0]["schemes"])

    # A halo has as much forward as backward, keys one part of three.
    assert received("selective") == received("none")
    halo, keys = (
        s["bytes_per_step"]
        for s in describe(example("parallel.context=2"), 4)["context"][0]["schemes"]
    )
    assert received("full") == received("offload") == halo * 3 // 2 + keys * 4 // 3


def test_check_prints_the_exchange_of_each_scheme() -> None:
    run = example("parallel.context={256: 1, 4096: 2}", "stages.0.micro_batch_tokens=4096")
    text = summary(run, 8).splitlines()
    assert "tensor 2 x context 2 x data 2 = 8 ranks, ZeRO 1, fp32" in text
    assert "256 tokens over 1 context rank" in text
    assert "4,096 tokens over 2 context ranks (zigzag): local halo, global keys" in text
    assert (
        "legal context degrees at 256 tokens: 1, 2, 4, 8, 16, 32, 64, 128; heads over 1, 2, 4"
        in (text)
    )


def test_a_description_with_context_ranks_keeps_the_width() -> None:
    path = CONFIGS / "runs/paper_rnope_swa_8b.yaml"
    text = render(describe(load(path, ["parallel.context={8192: 1, 65536: 8}"])), width=110)
    assert max(map(len, text.splitlines())) <= 110
    assert "tensor 4 x context 8 x data 1" in text
    for part in ("legal context degrees at 65,536 tokens", "MB/step", "tensor alone", "halo"):
        assert part in text
