"""Every message a run file can cause, once, word for word."""

import pytest

from megahybrid.config import check_run
from megahybrid.errors import ConfigError
from tests.config.example import example

LOCAL = "model.layer_plan.schemes.local"
GLOBAL = "model.layer_plan.schemes.global"

READING = [
    (
        "kernels={norm: apex, blocks: compiled}",
        "kernels.norm=apex cannot be traced by the compiler (kernels.blocks=compiled). "
        "Use kernels.norm=torch, which compiled layers fuse, or kernels.blocks=plain.",
    ),
    (f"{LOCAL}.windw=64", f"{LOCAL}.windw is not a field. Did you mean 'window'?"),
    ("parallel.tensr=6", "parallel.tensr is not a field. Did you mean 'tensor'?"),
    (
        "parallel.xyz=6",
        "parallel.xyz is not a field. The fields here are tensor, context, exchange, zero_stage, "
        "offload.",
    ),
    ("modle.a=1", "modle is not a field. Did you mean 'model'?"),
    (
        "stages.1.learning_rate.decay_tokens=5",
        "stages.1.learning_rate.decay_tokens is a field of kind: wsd, not of kind: linear. "
        "Remove it, or change the kind.",
    ),
    (
        "parallel.tensor=two",
        "parallel.tensor=two is not an integer (it is text). Write an integer.",
    ),
    (
        "parallel.tensor='2'",
        "parallel.tensor=2 is not an integer (it is text). Write an integer without quotes.",
    ),
    (
        "parallel.tensor=true",
        "parallel.tensor=true is not an integer (it is a boolean). Write an integer.",
    ),
    (
        "stages.0.tokens=8e5",
        "stages.0.tokens=800000.0 is not an integer (it has a fraction or an exponent). "
        "Write 800_000.",
    ),
    (
        "stages.0.tokens=",
        "stages.0.tokens=null is not an integer (it is empty). Give it a value.",
    ),
    ("model.eps=small", "model.eps=small is not a number (it is text). Write a number."),
    ("model.eps=.nan", "model.eps=nan is not a finite number. Write a finite number."),
    ("model.eps=0", "model.eps=0 must be greater than 0. Change it."),
    (
        "model.tie_embeddings=no",
        "model.tie_embeddings=no is not true or false (it is text). Write true or false.",
    ),
    ("directory=2024", "directory=2024 is not text. Put it in quotes."),
    (
        "data=4",
        "data=4 is not a mapping. Write a mapping: "
        "{sources: {web: {path: data/web/train}}, block_tokens: 262144}.",
    ),
    (
        "stages.0.weights=books",
        "stages.0.weights=books is not a mapping. Write a mapping: {web: 3, code: 1}.",
    ),
    (
        f"{LOCAL}.position=rope",
        f"{LOCAL}.position=rope is not a mapping. Write a mapping: {{kind: rope, theta: 10000}}.",
    ),
    (
        "model.num_layers=8",
        "model.num_layers is not a field. It is model.layer_plan.num_layers.",
    ),
    (f"{LOCAL}.theta=5", f"{LOCAL}.theta is not a field. It is {LOCAL}.position.theta."),
    ("lr=0.1", "lr is not a field. It is stages.N.learning_rate."),
    (
        "stages.0.clip_norm=1",
        "stages.0.clip_norm is not a field. It is optimizer.clip_norm.",
    ),
    (
        "data.path=x",
        "data.path is not a field. It is data.sources.NAME.path or data.held_out.NAME.path.",
    ),
    (
        "model.layer_plan.pattern=local",
        "model.layer_plan.pattern=local is not a list. Write a list: "
        "[local, local, local, global].",
    ),
    ("model.block=pre", "model.block=pre is not one of pre_norm, post_norm, sandwich, parallel."),
    ("log.wandb=of", "log.wandb=of is not one of off, offline, online. Did you mean 'off'?"),
    ("parallel.zero_stage=4", "parallel.zero_stage=4 is not one of 0, 1, 2, 3."),
    (
        f"{LOCAL}.position.kind=rop",
        f"{LOCAL}.position.kind=rop is not one of rope, nope. Did you mean 'rope'?",
    ),
    (
        f"{LOCAL}.position={{theta: 5}}",
        f"{LOCAL}.position={{theta: 5}} does not say its kind. Add kind: with one of rope, nope.",
    ),
    (f"{LOCAL}.position={{kind: rope}}", f"{LOCAL}.position.theta is missing. Give it a value."),
    (f"{LOCAL}.window=0", f"{LOCAL}.window=0 must be at least 1. Change it."),
    (
        f"{GLOBAL}.position.theta=1",
        f"{GLOBAL}.position.theta is a field of kind: rope, not of kind: nope. "
        "Remove it, or change the kind.",
    ),
    (
        f"{LOCAL}.position.scaling={{kind: llama3, factor: 8, original_length: 8, "
        "low_frequency_factor: 5}",
        f"{LOCAL}.position.scaling.high_frequency_factor=4.0 is below "
        "low_frequency_factor=5.0. Raise high_frequency_factor.",
    ),
    (
        f"{LOCAL}.position.scaling={{kind: yarn, factor: 8, original_length: 8, beta_slow: 40}}",
        f"{LOCAL}.position.scaling.beta_fast=32 is not above beta_slow=40. Raise beta_fast.",
    ),
    (
        f"{LOCAL}.qk_norm={{kind: rms, over: projection, weight: per_head}}",
        f"{LOCAL}.qk_norm.weight=per_head has no meaning with over=projection (its weight already "
        "covers every head). Leave weight out.",
    ),
    (
        "model.layer_plan.pattern=[local, globl]",
        "model.layer_plan.pattern names 'globl', which schemes does not define. "
        "Did you mean 'global'?",
    ),
    (
        "model.layer_plan.pattern=[local, local, global]",
        "model.layer_plan.pattern has 3 entries, which do not tile num_layers=8. "
        "Use a multiple of 3 layers, or a pattern given by period and offset.",
    ),
    (
        "model.layer_plan.pattern=[local]",
        "model.layer_plan.schemes defines 'global', which no layer uses (pattern uses local). "
        "Remove it or name it in pattern.",
    ),
    (
        "model.layer_plan.pattern=[]",
        "model.layer_plan.pattern=[] names no scheme. Name one scheme per layer of a period.",
    ),
    (
        "model.layer_plan.pattern={default: local, special: global, period: 4, offset: 4}",
        "model.layer_plan.pattern.offset=4 never occurs (period=4). Use 0 to 3.",
    ),
    (
        "model.layer_plan.pattern={default: local, special: global, period: 2, offset: 0, "
        "prefix: [local, local, local, local, local, local, local, local, global]}",
        "model.layer_plan.pattern.prefix has 9 entries, more than num_layers=8. "
        "Shorten the prefix.",
    ),
    (
        "model.layer_plan.schemes={}",
        "model.layer_plan.schemes={} has 0 entries and needs 1. Change it.",
    ),
    (
        "model.layer_plan.schemes={a.b: {position: {kind: nope}}}",
        "model.layer_plan.schemes has the key 'a.b', which is not a name "
        "(letters, digits, _ and - only, at most 100).",
    ),
    (
        "model.num_heads=7",
        "model.num_heads=7 does not divide hidden_size=128. Change one of them, or give head_dim.",
    ),
    (
        "model.num_kv_heads=3",
        "model.num_kv_heads=3 does not divide num_heads=8. Use 1, 2, 4 or 8.",
    ),
    (
        "model.head_dim=33",
        f"{LOCAL}.position.kind=rope rotates pairs of dimensions (model.head_dim=33 is odd). "
        "Use an even head_dim.",
    ),
    (
        f"{LOCAL}.position.rotary_fraction=0.05",
        f"{LOCAL}.position.rotary_fraction=0.05 rotates no pair (model.head_dim=16). "
        "Raise it, or use kind: nope.",
    ),
    (
        f"{LOCAL}.position={{kind: rope, theta: 100, rotary_fraction: 0.125, "
        "scaling: {kind: ntk, factor: 2}}",
        f"{LOCAL}.position.scaling.kind=ntk needs more than one rotated pair "
        "(rotary dimensions=2, model.head_dim=16). Use kind: linear.",
    ),
    (
        f"{LOCAL}.position.scaling={{kind: longrope, factors: [1, 2, 3], factor: 4, "
        "original_length: 64}",
        f"{LOCAL}.position.scaling.factors has 3 entries, not the 8 of half the 16 dimensions that "
        "its frequencies are of (model.head_dim=16). Give 8.",
    ),
    (
        f"{LOCAL}.position.scaling={{kind: longrope, factors: [1, 0], factor: 4, "
        "original_length: 64}",
        f"{LOCAL}.position.scaling.factors.1=0 is not above 0. Raise it.",
    ),
    (
        "stages.0.lengths={a: 1}",
        "stages.0.lengths has the key 'a', which is not an integer.",
    ),
    ("stages.0.lengths={0: 1}", "stages.0.lengths has the key '0', which must be greater than 0."),
    ("stages.0.lengths={}", "stages.0.lengths={} has 0 entries and needs 1. Change it."),
    (
        "stages.1.recompute=[none, ful]",
        "stages.1.recompute.1=ful is not one of none, selective, chunked, full, offload. "
        "Did you mean 'full'?",
    ),
    (
        "stages.0.batch_tokens={start: 8192, end: 4096, increment: 4096, over_tokens: 9}",
        "stages.0.batch_tokens.end=4096 is not above start=8192. Raise end.",
    ),
    (
        "stages.0.batch_tokens={start: 8192, end: 16384, increment: 5000, over_tokens: 9}",
        "stages.0.batch_tokens.increment=5000 does not divide end - start=8192. "
        "Change one of them.",
    ),
    (
        "stages.0.learning_rate={kind: wsd, start: 1, end: 0, decay_tokens: 900000}",
        "stages.0.tokens=800000 has no room for the learning rate's warm-up and decay "
        "(900000 tokens). Shorten them.",
    ),
    (
        "stages.0.learning_rate.kind=cosin",
        "stages.0.learning_rate.kind=cosin is not one of linear, cosine, wsd. "
        "Did you mean 'cosine'?",
    ),
    (
        "stages.0.weights={stdlib: 0}",
        "stages.0.weights has no positive share. Give at least one source a weight.",
    ),
    ("stages.1.name=short", "stages.1.name=short is also the name of stages.0. Change one."),
    (
        "optimizer.betas=[0.9]",
        "optimizer.betas.1 is missing. Give it a value.",
    ),
    (
        "optimizer.betas=[0.9, 0.9, 0.9]",
        "optimizer.betas=[0.9, 0.9, 0.9] has 3 entries and takes 2. Change it.",
    ),
    ("optimizer.betas=[0.9, 1]", "optimizer.betas.1=1 must be less than 1. Change it."),
    (
        "optimizer.parametrisation=mup",
        "optimizer.base_hidden_size is missing (parametrisation=mup). "
        "Give the hidden_size at which the learning rate was tuned.",
    ),
    (
        "optimizer.base_hidden_size=64",
        "optimizer.base_hidden_size=64 has no meaning with parametrisation=standard. "
        "Remove it, or use parametrisation: mup.",
    ),
    (
        "log.profile_steps=[5, 5]",
        "log.profile_steps=[5, 5] holds no step. Use [start, stop] with start < stop.",
    ),
    (
        "stages.2.tokens=4",
        "stages.2.tokens names item '2' of a list (it has 2 items). "
        "Use a number from 0 to 1, or set the whole list.",
    ),
    (
        "parallel",
        "'parallel' is not an override. Write key.sub=value, for example parallel.tensor=2.",
    ),
    (
        "a..b=1",
        "'a..b=1' is not an override. Write key.sub=value, for example parallel.tensor=2.",
    ),
]

CHECKING = [
    (
        ["parallel.tensor=3", "model.intermediate_size=384", "stages.0.lengths={384: 1}"],
        "parallel.tensor=3 does not divide model.num_heads=8. "
        "Use 1, 2, 4 or 8, or change model.num_heads.",
    ),
    (
        ["model.num_heads=12", "model.num_kv_heads=6", "model.head_dim=16", "parallel.tensor=4"],
        "parallel.tensor=4 and model.num_kv_heads=6 do not divide one another. "
        "Use 1, 2, 3, 6 or 12, or change model.num_kv_heads.",
    ),
    (
        ["model.intermediate_size=385"],
        "parallel.tensor=2 does not divide model.intermediate_size=385. "
        "Use 1, or change model.intermediate_size.",
    ),
    (
        ["parallel.tensor=8"],
        "parallel.tensor=8 does not divide the world size of 4 ranks. "
        "Use 1, 2 or 4, or start a multiple of 8 ranks.",
    ),
    (
        ["parallel.zero_stage=0"],
        "parallel.zero_stage=0 is right only in fp32 without tensor parallelism (precision=fp32, "
        "parallel.tensor=2): DeepSpeed's stage 0 reports a wrong gradient norm otherwise. "
        "Use zero_stage: 1.",
    ),
    (
        ["device=cpu", "kernels.windowed=flex"],
        "kernels.windowed=flex needs CUDA (device=cpu). Use auto.",
    ),
    (
        ["stages.0.lengths={257: 1}"],
        "stages.0.lengths names 257, which parallel.tensor=2 does not divide (each tensor rank "
        "holds a part of the sequence). Use a multiple of 2.",
    ),
    (
        ["stages.1.micro_batch_tokens=5120"],
        "stages.1.micro_batch_tokens=5120 is not a multiple of 4096 (stages.1.lengths). "
        "Use 4096 or 8192.",
    ),
    (
        ["stages.1.micro_batch_tokens=1024"],
        "stages.1.micro_batch_tokens=1024 is not a multiple of 4096 (stages.1.lengths). Use 4096.",
    ),
    (
        ["stages.1.batch_tokens=10240"],
        "stages.1.batch_tokens=10240 is not a multiple of 4096 (stages.1.lengths). "
        "Use 8192 or 12288.",
    ),
    (
        ["stages.0.batch_tokens=12288"],
        "stages.0.batch_tokens=12288 is not a multiple of 8192 (2 data ranks times "
        "stages.0.micro_batch_tokens=4096). Use 8192 or 16384.",
    ),
    (
        [
            "stages.0.batch_tokens={start: 8192, end: 16384, increment: 4096, over_tokens: 9}",
        ],
        "stages.0.batch_tokens.increment=4096 is not a multiple of 8192 (2 data ranks times "
        "stages.0.micro_batch_tokens=4096). Use 8192.",
    ),
    (
        ["stages.1.tokens=5000"],
        "stages.1.tokens=5000 is less than one batch (stages.1.batch_tokens=8192). "
        "Use at least 8192.",
    ),
    (
        ["data.block_tokens=2048"],
        "data.block_tokens=2048 is shorter than the longest length (stages.1.lengths names 4096). "
        "Use at least 4096.",
    ),
    (
        ["stages.0.weights={stdlb: 1}"],
        "stages.0.weights names 'stdlb', which data.sources does not define (stdlib). "
        "Did you mean 'stdlib'?",
    ),
    (
        ["stages.0.weights={web: 1}"],
        "stages.0.weights names 'web', which data.sources does not define (stdlib). "
        "Define it, or remove it.",
    ),
    (
        ["stages.1.recompute=[none, full]"],
        "stages.1.recompute has 2 entries (model.layer_plan.num_layers=8). "
        "Give one per layer, or one word for all.",
    ),
    (
        ["stages.1.schemes={globl: {window: 3}}"],
        "stages.1.schemes.globl names no scheme of model.layer_plan.schemes (local, global). "
        "Did you mean 'global'?",
    ),
    (
        ["stages.1.schemes={local: {windw: 3}}"],
        "stages.1.schemes.local.windw is not a field. Did you mean 'window'?",
    ),
    (
        ["stages.1.schemes={global: {position: {theta: 100000}}}"],
        "stages.1.schemes.global.position.theta has nothing to act on: these layers have no "
        "rotation (position.kind=nope). Remove it, or name the scheme that rotates.",
    ),
    (
        ["stages.1.schemes={global: {position: {scaling: {kind: linear, factor: 2}}}}"],
        "stages.1.schemes.global.position.scaling has nothing to act on: these layers have no "
        "rotation (position.kind=nope). Remove it, or name the scheme that rotates.",
    ),
    (
        ["stages.1.schemes={local: {qk_norm: {kind: rms}}}"],
        "stages.1.schemes.local changes which parameters exist (none to qk_norm over head, weight "
        "shared). Keep qk_norm, ssmax, gate, bias, sink and fuse as the model has them.",
    ),
    (
        ["stages.1.schemes={global: {score_scale: {kind: ssmax}}}"],
        "stages.1.schemes.global changes which parameters exist (none to ssmax scale). "
        "Keep qk_norm, ssmax, gate, bias, sink and fuse as the model has them.",
    ),
    (
        ["stages.1.schemes={local: {position: {rotary_fraction: 0.01}}}"],
        "stages.1.schemes.local.position.rotary_fraction=0.01 rotates no pair (model.head_dim=16). "
        "Raise it, or use kind: nope.",
    ),
]


@pytest.mark.parametrize(("override", "line"), READING, ids=[o[:50] for o, _ in READING])
def test_a_value_that_cannot_be_read_is_named_in_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        example(override)
    assert str(error.value).splitlines() == [line]


@pytest.mark.parametrize(("overrides", "line"), CHECKING, ids=[o[0][:50] for o, _ in CHECKING])
def test_parts_that_disagree_are_named_in_one_line(overrides: list[str], line: str) -> None:
    run = example(*overrides)
    with pytest.raises(ConfigError) as error:
        check_run(run, 4)
    lines = str(error.value).splitlines()
    assert line in lines
    assert len(lines) == 1 or overrides[0] in SEVERAL


# These disagree with several other values at once.
SEVERAL = (
    "parallel.tensor=3",
    "stages.1.batch_tokens=10240",
    "stages.0.lengths={257: 1}",
    "stages.1.micro_batch_tokens=5120",
)


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        example("parallel.tensr=6", "model.eps=-1", "stages.1.tokens=x")
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(ConfigError) as error:
        check_run(example("model.intermediate_size=385", "data.block_tokens=2048"), 4)
    assert len(str(error.value).splitlines()) == 2


def test_the_example_itself_is_right() -> None:
    check_run(example())
    check_run(example(), 4)


def test_more_tensor_ranks_than_kv_heads_are_legal_when_heads_divide() -> None:
    check_run(example("parallel.tensor=8"), 8)
