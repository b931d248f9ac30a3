"""Models that are built divided, and what DeepSpeed brings besides, on two ranks of a crew."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import deepspeed_cases as cases
import torch
from drivetrain_interfaces import (
    CheckpointError,
    ConfigurationError,
    EvalSpec,
    ModelState,
    StepSpec,
    UnsupportedError,
)
from drivetrain_toolkit.strategies import DDPStrategy
from torch import nn

from drivetrain_deepspeed import DeepSpeedStrategy, cpu_adam
from drivetrain_deepspeed.precision import DeepSpeedPrecision


def shaped(device):
    """The network of the cases, built on a device."""
    with torch.device(device):
        return nn.Sequential(nn.Linear(16, 31), nn.Tanh(), nn.Linear(31, 3))


class Held:
    """The most elements of parameters that a rank had at once while a model got its values."""

    def __init__(self):
        self.most = 0

    def look(self, module):
        held = sum(p.numel() for p in module.parameters() if not p.is_meta)
        self.most = max(self.most, held)


def built(rank):
    """Models on the meta device and under ``zero_init``, trained; and what was held meanwhile."""
    answer = {}
    for stage in (1, 3):
        for precision in ("32-true", "bf16-true"):
            strategy = cases.divided() if stage == 3 else DeepSpeedStrategy(stage)
            module = shaped("meta")
            held = Held()
            with held_by_layers(held, module):
                run = cases.Run(rank, strategy, precision, module=module)
            start = run.state()[0]
            losses = on_one_window(run.step, rank)
            answer[stage, precision] = {"start": start, "losses": losses, "most": held.most}
            run.close()
    for precision in ("32-true", "bf16-true"):
        strategy = cases.divided()
        bound = rank.bind_object(strategy, precision)
        torch.manual_seed(rank.world.rank)
        with bound.zero_init():
            module = shaped("cpu")
        held = sum(p.numel() for p in module.parameters())
        prepared = bound.prepare(module)
        still = sum(p.numel() for p in prepared.parameters())
        optimizer = cases.adamw(prepared)
        step = bound.train_step(cases.StepSpec(prepared, [optimizer], cases.loss))
        start = dict(bound.state().module)
        losses = on_one_window(step, rank)
        answer["zero_init", precision] = {
            "start": start, "losses": losses, "most": max(held, still),
        }  # fmt: skip
        bound.close()
    answer["refused"] = refusals(rank)
    return answer


def on_one_window(step, rank):
    """Losses of steps on the same data, which must fall."""
    window = cases.windows(rank.world.rank, 1)[0]
    return [float(step(window).loss) for _ in range(5)]


@contextmanager
def held_by_layers(held, module):
    """Look at what is held after each layer got its values."""
    import drivetrain_deepspeed.building as building

    original = building.materialize

    @functools.wraps(original)
    def looking(*args, **settings):
        original(*args, **settings)
        held.look(module)

    building.materialize = looking
    try:
        yield
    finally:
        building.materialize = original


def refusals(rank):
    """A layer without first values, and one that was divided in another format."""
    texts = []
    bound = rank.bind_object(cases.divided())
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(4, 4), WithoutValues())
    try:
        bound.prepare(bare)
    except ConfigurationError as error:
        texts.append(error.message)
    half = rank.bind_object(cases.divided(), "bf16-true")
    with half.zero_init():
        module = nn.Linear(4, 4)
    try:
        bound.prepare(module)
    except ConfigurationError as error:
        texts.append(error.message)
    return texts


class WithoutValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(4))


class Checkpointed(nn.Module):
    """The network of the cases, which makes its first half again in backward."""

    def __init__(self, seed=0, *, again=True):
        super().__init__()
        self.layers = cases.network(seed)
        self.again = again

    def forward(self, x):
        import deepspeed

        first = self.layers[:2]
        x = x.detach().requires_grad_()  # it is reentrant, and needs something to differentiate
        x = deepspeed.checkpointing.checkpoint(first, x) if self.again else first(x)
        return self.layers[2](x)


def activations(rank):
    """Activation checkpointing by DeepSpeed, with its section and without checkpointing."""
    import deepspeed.runtime.activation_checkpointing.checkpointing as settings

    answer = {}
    for stage in (2, 3):
        for again in (True, False):
            section = {"partition_activations": False, "profile": False, "number_checkpoints": 1}
            strategy = DeepSpeedStrategy(stage, activation_checkpointing=section if again else None)
            module = Checkpointed(again=again)
            run = cases.Run(rank, strategy, module=module)
            run.train(5)
            answer[stage, again] = run.state()[0]
            if again:
                answer["configured", stage] = settings.num_layers
            run.close()
    return answer


def native(rank, folder):
    """DeepSpeed's own format: out and in, refused where it does not fit, and made universal."""
    answer = {"refused": {}}
    for stage in (0, 1, 2, 3):
        run = cases.Run(rank, cases.divided() if stage == 3 else DeepSpeedStrategy(stage))
        run.train(4)
        run.strategy.save_native(Path(folder, f"stage{stage}"), "four", {"epoch": 7})
        state = run.state()
        run.train(2, start=4)
        end = run.state()
        run.close()
        strategy = cases.divided() if stage == 3 else DeepSpeedStrategy(stage)
        run = cases.Run(rank, strategy, module=cases.network(9))
        kept = run.strategy.load_native(Path(folder, f"stage{stage}"), trusted=True)
        loaded = run.state()
        run.train(2, start=4)
        answer[stage] = {"state": state, "end": end, "loaded": loaded, "again": run.state()}
        answer[stage]["kept"] = kept.get("epoch")
        run.close()
    for stage in (0, 1, 2, 3):
        strategy = cases.divided() if stage == 3 else DeepSpeedStrategy(stage)
        run = cases.Run(rank, strategy)
        wrong = {"untrusted": (stage, False), "other stage": ((stage + 2) % 4, True)}
        for name, (other, trusted) in wrong.items():
            text = refused(run.strategy, Path(folder, f"stage{other}"), trusted)
            answer["refused"][name, stage] = text
        run.close()
    return answer


def refused(strategy, place, trusted):
    try:
        strategy.load_native(place, "four", trusted=trusted)
    except CheckpointError as error:
        return error.message
    return ""


def universal(rank, folder):
    """A universal checkpoint of stage 3 and one of stage 1, loaded at other stages."""
    answer = {}
    for source, target in ((3, 3), (1, 2)):
        config = {"checkpoint": {"load_universal": True}}
        if target == 3:
            config |= cases.ALL_DIVIDED
        run = cases.Run(rank, DeepSpeedStrategy(target, config=config), module=cases.network(9))
        run.strategy.load_native(Path(folder, f"stage{source}"), "four_universal", trusted=True)
        run.train(2, start=4)
        answer[source, target] = run.state()
        run.close()
    return answer


def our_scheduler(rank):
    """A scheduler of torch's, over every stage; where it leads with DDP."""
    answer = {}
    for name, strategy in (
        ("ddp", DDPStrategy()),
        *((stage, DeepSpeedStrategy(stage)) for stage in (0, 1, 2, 3)),
    ):
        run = cases.Run(rank, strategy)
        scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 2, 0.5)
        for number in range(6):
            run.train(1, start=number)
            scheduler.step()
        answer[name] = run.state()[0]
        run.close()
    return answer


def messages(rank):
    """How many messages a step of ours sends, and one by hand on the same engine."""
    answer = {}
    for stage in (0, 1, 2, 3):
        run = cases.Run(rank, cases.divided() if stage == 3 else DeepSpeedStrategy(stage))
        window = cases.windows(rank.world.rank, 1)[0]
        engine = run.strategy.engine
        for _ in range(3):
            run.step(window)
        counts = []
        for by_hand in (False, True):
            with counted_messages() as seen:
                for _ in range(3):
                    if by_hand:
                        loss = engine(window[0])
                        engine.backward(loss)
                        engine.step()
                    else:
                        run.step(window)
            counts.append(dict(seen))
        answer[stage] = counts
        run.close()
    return answer


@contextmanager
def counted_messages():
    """Count calls of torch's collectives."""
    seen = Counter()
    names = [
        name
        for name in (
            "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "barrier",
            "all_gather_object", "broadcast", "broadcast_object_list", "reduce", "reduce_scatter",
            "reduce_scatter_tensor", "reduce_scatter_single", "all_gather_coalesced",
        )
        if hasattr(torch.distributed, name)
    ]  # fmt: skip
    import deepspeed

    backend = deepspeed.comm.comm.cdb
    own = ("all_gather_function", "reduce_scatter_function")
    kept = [(torch.distributed, name, getattr(torch.distributed, name)) for name in names]
    kept += [(backend, name, getattr(backend, name)) for name in own]

    def counting(function, name):
        @functools.wraps(function)
        def counted(*args, **settings):
            seen[name] += 1
            return function(*args, **settings)

        return counted

    for where, name, function in kept:
        setattr(where, name, counting(function, name))
    try:
        yield seen
    finally:
        for where, name, function in kept:
            setattr(where, name, function)


def float16(rank):
    """float16 with the engine's scale, where DeepSpeed says that the device has it."""
    import deepspeed

    if not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        try:
            rank.bind_object(DeepSpeedStrategy(1), DeepSpeedPrecision(16))
        except UnsupportedError as error:
            return {"refused": error.message}
    answer = {}
    for stage in (1, 2, 3):
        make = functools.partial(DeepSpeedStrategy, stage, config={"fp16": {"loss_scale": 64}})
        run = cases.Run(rank, make(), DeepSpeedPrecision(16))
        losses = on_one_window(run.step, rank)
        state = run.state()
        dtypes = {p.dtype for p in run.module.parameters()}
        run.train(5, start=10)
        end = run.state()
        run.close()
        run = cases.Run(rank, make(), DeepSpeedPrecision(16), cases.network(5))
        run.strategy.load(ModelState(*state))
        run.train(5, start=10)
        answer[stage] = {"losses": losses, "dtypes": dtypes, "end": end, "again": run.state()}
        run.close()
    return answer


def host_adam(rank):
    """DeepSpeed's Adam for the host at stages 1, 2 and 3 with offload, against torch's by DDP."""
    answer = {}

    def torchs(module):
        return torch.optim.AdamW(module.parameters(), lr=1e-2)

    def deepspeeds(module):
        return cpu_adam(module.parameters(), lr=1e-2)

    run = cases.Run(rank, DDPStrategy(), make=torchs)
    run.train(10)
    answer["ddp"] = run.state()[0]
    run.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, strategy in (
            ("2", DeepSpeedStrategy(2, offload_optimizer="cpu")),
            ("3", DeepSpeedStrategy(3, offload_optimizer="cpu", offload_parameters="cpu")),
        ):
            run = cases.Run(rank, strategy, make=deepspeeds)
            run.train(10)
            answer[name] = run.state()[0]
            answer["kind"] = type(run.optimizer).__name__
            run.close()
    answer["notices"] = [str(w.message) for w in caught if "offloaded" in str(w.message)]
    return answer


#: Each part of a weight has a mebibyte, below which DeepSpeed puts nothing into a file.
BROAD, NARROW = 1024, 512
#: More weights than there are buffers for what is read.
WEIGHTS, BUFFERS = 6, 5


def broad(seed):
    torch.manual_seed(seed)
    layers = []
    for _ in range(WEIGHTS // 2):
        layers += [nn.Linear(BROAD, NARROW), nn.Tanh(), nn.Linear(NARROW, BROAD)]
    return nn.Sequential(*layers)


def in_files(rank, folder, make_optimizer):
    """The optimizer's state and parameters in files at stage 3: trained, evaluated and resumed."""
    make = {"torch": torch.optim.AdamW, "deepspeed": cpu_adam}[make_optimizer]

    def files():
        return DeepSpeedStrategy(
            3, offload_optimizer="nvme", offload_parameters="nvme", nvme_path=folder,
            sub_group_size=300_000,
            config={
                "zero_optimization": {
                    "stage3_param_persistence_threshold": 0,
                    "reduce_bucket_size": 600_000,
                    "stage3_max_live_parameters": 600_000,  # or all would stay in buffers
                    "stage3_max_reuse_distance": 600_000,
                    "stage3_prefetch_bucket_size": 600_000,
                    "offload_param": {
                        "buffer_size": 600_000, "buffer_count": BUFFERS, "max_in_cpu": 0,
                    },
                }
            },
        )  # fmt: skip

    def start(strategy, seed, device="cpu"):
        bound = rank.bind_object(strategy)
        with torch.device(device):
            module = broad(seed)
        module = bound.prepare(module)
        optimizer = make(module.parameters(), lr=1e-3)
        return bound, module, bound.train_step(StepSpec(module, [optimizer], squared))

    def train(step, first, count):
        for number in range(first, first + count):
            generator = torch.Generator().manual_seed(10 * number + rank.world.rank)
            step([torch.randn(4, BROAD, generator=generator)])

    def measure(bound, module):
        with bound.eval_step(EvalSpec(module, squared)) as evaluate:
            return float(evaluate(torch.ones(2, BROAD)))

    bound, module, step = start(files(), 0)
    train(step, 0, 3)
    state = bound.state()
    answer = {"found": measure(bound, module)}
    answer["files"] = {p.parts[-3] for p in Path(folder).rglob("rank0/*.swp")}
    answer["parameters"] = sum(1 for p in Path(folder).rglob("rank0/*_param.tensor.swp"))
    weights = [p for p in module.parameters() if p.ds_numel == BROAD * NARROW]
    answer["held"] = max(p.ds_tensor.numel() for p in weights)
    train(step, 3, 2)
    end = bound.state()
    bound.close()
    alone = rank.bind_object(DeepSpeedStrategy(0))
    again = alone.prepare(module)  # whole again, from the files
    answer["whole"] = differing(dict(again.state_dict()), end.module)
    for device, name in (("cpu", "resumed"), ("meta", "from meta")):
        bound, _, step = start(files(), 4, device)
        bound.load(state)
        answer["loaded"] = differing_states(bound.state(), state)
        train(step, 3, 2)
        answer[name] = differing_states(bound.state(), end)
        bound.close()
    plain, module, step = start(DDPStrategy(), 0)
    train(step, 0, 3)
    answer["wanted"] = measure(plain, module)
    train(step, 3, 2)
    wanted = plain.state().module
    answer["apart"] = max(float((end.module[n] - v).abs().max()) for n, v in wanted.items())
    return answer


def squared(module, batch):
    return module(batch).square().mean()


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name, value in other.items() if not torch.equal(one[name], value)]


def differing_states(one, other):
    names = differing(one.module, other.module)
    mine, theirs = one.optimizers[0]["state"], other.optimizers[0]["state"]
    assert mine.keys() == theirs.keys()
    for name, entry in theirs.items():
        for key, value in entry.items():
            if not torch.equal(torch.as_tensor(mine[name][key]), torch.as_tensor(value)):
                names.append((name, key))
    return names
