"""Numbers that follow from the configuration, by hand, and the remedies in the errors."""

import pytest

from data.spec import DataSpec
from launcher.compose import compose
from training.config import BatchSection, ModelSection, OptimSection, ScheduleSection, TrainConfig
from training.start.derive import derive

N_30M = 30_482_560


def config(**fields) -> TrainConfig:
    return TrainConfig(data=DataSpec(source="pydocs"), **fields)


def test_published_30m_run():
    numbers = derive(config(tokens=3e9), N_30M, world=4)
    assert (numbers.sequences, numbers.tokens_per_step) == (512, 262_144)
    assert numbers.steps == 11_444  # floor(3e9 / 262144)
    assert numbers.tokens == 11_444 * 262_144
    assert (numbers.micro, numbers.micro_batches, numbers.accumulation) == (128, 4, 1)
    assert numbers.schedule.warmup_steps == 1_144
    assert [list(numbers.micro_batches_of(rank)) for rank in range(4)] == [[0], [1], [2], [3]]


def test_warm_up_is_rounded():
    assert derive(config(steps=15), N_30M, world=1).schedule.warmup_steps == 2  # 10 % are 1.5


def test_ranks_get_contiguous_micro_batches_that_cover_the_batch():
    numbers = derive(config(steps=10, batch=BatchSection(sequences=24, micro=2)), N_30M, world=3)
    dealt = [list(numbers.micro_batches_of(rank)) for rank in range(3)]
    assert dealt == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_length_defaults_to_20_tokens_a_parameter():
    numbers = derive(config(), N_30M, world=1)
    assert numbers.steps == 20 * N_30M // 262_144


def test_micro_batch_follows_the_preset_and_never_the_machine():
    section = ModelSection(micro_tokens=8192)
    for world in (1, 2, 4):
        assert derive(config(steps=1, model=section), N_30M, world).micro == 16
    assert derive(config(steps=1, model=section, batch=BatchSection(sequences=20)), N_30M, 1).micro == 10


def test_warmup_in_tokens_or_steps():
    batch = BatchSection(sequences=8, seq_len=128)
    by_tokens = derive(config(steps=100, batch=batch, schedule=ScheduleSection(warmup_tokens=20480)), N_30M, 1)
    by_steps = derive(config(steps=100, batch=batch, schedule=ScheduleSection(warmup_steps=20)), N_30M, 1)
    assert by_tokens.schedule.warmup_steps == by_steps.schedule.warmup_steps == 20
    short = derive(config(steps=100, batch=batch, schedule=ScheduleSection(warmup_tokens=20479)), N_30M, 1)
    assert short.schedule.warmup_steps == 19  # whole steps within the tokens
    wsd = derive(config(steps=99, schedule=ScheduleSection(name="wsd", decay_fraction=0.45)), N_30M, 1)
    assert wsd.schedule.decay_steps == 45  # 44.55


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(optim=OptimSection(name="muon")), "optim=muon is made for model=nanochat_560m"),
        (
            dict(model=ModelSection(family="nanochat", lr=0.02), optim=OptimSection(name="muon_rms")),
            "takes AdamW's rates.*use optim=muon",
        ),
        (
            dict(model=ModelSection(family="nanochat", lr=0.02)),
            "its rate of 0.02 is Muon's; add optim=muon schedule=wsd",
        ),
    ],
)
def test_a_presets_rate_belongs_to_one_optimizer(fields, message):
    with pytest.raises(ValueError, match=message):
        derive(config(steps=10, **fields), N_30M, 1)


def test_adamw_may_train_nanochat_at_a_rate_of_its_own():
    fields = dict(model=ModelSection(family="nanochat", lr=0.02), optim=OptimSection(lr=1e-3))
    assert derive(config(steps=10, **fields), N_30M, 1).schedule.lr_peak == 1e-3


@pytest.mark.parametrize(
    ("fields", "world", "parts"),
    [
        (dict(batch=BatchSection(tokens=1000)), 1, ["batch.tokens=1000", "batch.seq_len=512", "batch.tokens=512"]),
        (dict(batch=BatchSection(sequences=10, micro=4)), 1, ["batch.micro=4", "batch.micro=2", "batch.sequences=8"]),
        (dict(batch=BatchSection(sequences=12, micro=4)), 2, ["over 2 GPUs", "batch.micro=3", "batch.sequences=8"]),
        (dict(tokens=1000), 1, ["tokens=1000", "262144"]),
        (dict(optim=OptimSection(head_lr=0.1)), 1, ["optim.head_lr=0.1: optim=adamw doesn't read it; optim=muon does"]),
        (dict(schedule=ScheduleSection(decay_fraction=0.2)), 1, ["schedule.decay_fraction=0.2", "schedule=wsd"]),
        (dict(steps=10**30), 1, ["1e+30 steps", "1e+09", "lower steps or tokens"]),
        (dict(steps=10, schedule=ScheduleSection(warmup_steps=11)), 1, ["11 warm-up", "schedule.warmup_steps"]),
    ],
)
def test_errors_carry_the_numbers_and_what_to_type(fields, world, parts):
    with pytest.raises(ValueError) as caught:
        derive(config(**fields), N_30M, world)
    for part in parts:
        assert part in str(caught.value)


def test_the_remedies_work():
    for fields, world in [
        (dict(batch=BatchSection(sequences=10, micro=2)), 1),
        (dict(batch=BatchSection(sequences=12, micro=3)), 2),
        (dict(batch=BatchSection(sequences=8, micro=4)), 2),
    ]:
        derive(config(steps=1, **fields), N_30M, world)


def test_a_warm_up_shorter_than_one_step_is_refused():
    def warmup(tokens):
        config = compose(["batch.tokens=65536", "steps=100", f"schedule.warmup_tokens={tokens}"]).config
        return derive(config, 10**6, world=1).schedule.warmup_steps

    assert (warmup(0), warmup(65536), warmup(200_000)) == (0, 1, 3)
    with pytest.raises(ValueError, match=r"schedule.warmup_tokens=65535 is less than one step of 65536 tokens"):
        warmup(65535)
