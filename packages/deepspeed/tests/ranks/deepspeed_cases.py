"""What two ranks are asked to do with a strategy. Run in the processes of a crew."""

from __future__ import annotations

import gc

import torch
from drivetrain_interfaces import Clip, ClusterError, EvalSpec, ModelState, StepHooks, StepSpec
from drivetrain_toolkit.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from drivetrain_deepspeed import DeepSpeedStrategy

STEPS = 20


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 31), nn.Tanh(), nn.Linear(31, 3))


def adamw(module):
    first, *rest = module.parameters()
    return torch.optim.AdamW([{"params": [first], "lr": 2e-2}, {"params": rest}], lr=1e-2)


def loss(module, batch):
    features, targets = batch
    return (module(features) - targets).square().mean()


def windows(rank, steps=STEPS, accumulate=1, start=0):
    made = []
    for number in range(start, start + steps):
        generator = torch.Generator().manual_seed(1000 * rank + number)
        count = accumulate if number % 3 else max(1, accumulate - 1)
        made.append(
            [
                (
                    torch.randn(8, 16, generator=generator),
                    torch.randn(8, 3, generator=generator),
                )
                for _ in range(count)
            ]
        )
    return made


class Run:
    """A strategy, its module, optimizer and step."""

    def __init__(self, rank, strategy, precision="32-true", module=None, make=adamw, **settings):
        self.rank = rank
        self.strategy = rank.bind_object(strategy, precision)
        self.module = self.strategy.prepare(network(rank.world.rank) if module is None else module)
        self.optimizer = make(self.module)
        settings.setdefault("accumulate", 1)
        self.step = self.strategy.train_step(
            StepSpec(self.module, [self.optimizer], loss, **settings)
        )
        self.accumulate = settings["accumulate"]

    def train(self, steps=STEPS, start=0):
        made = windows(self.rank.world.rank, steps, self.accumulate, start)
        with self.step:
            return [self.step(window) for window in made]

    def state(self):
        state = self.strategy.state()
        return dict(state.module), list(state.optimizers), dict(state.precision)

    def close(self):
        self.strategy.close()


def trained(rank, strategy, precision="32-true", **settings):
    run = Run(rank, strategy, precision, **settings)
    results = run.train()
    answer = {
        "state": run.state(),
        "losses": [float(r.loss) for r in results],
        "norms": [None if r.grad_norm is None else float(r.grad_norm) for r in results],
    }
    run.close()
    return answer


def every_stage(rank):
    """The same training by DDP and at every stage."""
    answers = {}
    for name, settings in {
        "plain": {},
        "clipped": {"clip": Clip(0.1)},
        "accumulated": {"accumulate": 3, "clip": Clip(0.1)},
    }.items():
        answers[name] = {"ddp": trained(rank, DDPStrategy(), **settings)}
        for stage in (0, 1, 2, 3):
            answers[name][stage] = trained(rank, DeepSpeedStrategy(stage), **settings)
    return answers


#: Nothing is kept whole because it is small.
ALL_DIVIDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def divided():
    return DeepSpeedStrategy(3, config=ALL_DIVIDED)


def resumed(rank, strategy, state, precision="32-true", **settings):
    """Ten further steps from a state; where they lead."""
    run = Run(rank, strategy, precision, network(5), **settings)
    run.strategy.load(ModelState(*state))
    loaded = run.state()
    run.train(10, start=10)
    answer = {"loaded": loaded, "end": run.state()}
    run.close()
    return answer


def states_go_anywhere(rank):
    """Saved after ten steps at stage 3, loaded at every stage, by DDP and by FSDP."""
    run = Run(rank, divided())
    run.train(10)
    state = run.state()
    run.train(10, start=10)
    answer = {"state": state, "end": run.state(), "loads": {}}
    run.close()
    targets = {"ddp": DDPStrategy(), "fsdp": FSDPStrategy(), 3: divided()}
    targets |= {stage: DeepSpeedStrategy(stage) for stage in (0, 1, 2)}
    for name, strategy in targets.items():
        answer["loads"][name] = resumed(rank, strategy, state)
    answer["from ddp"] = {}
    run = Run(rank, DDPStrategy())
    run.train(10)
    state = run.state()
    run.close()
    for stage in (1, 2, 3):
        strategy = divided() if stage == 3 else DeepSpeedStrategy(stage)
        answer["from ddp"][stage] = resumed(rank, strategy, state)["end"]
    return answer


def half_precision(rank):
    """Training in bfloat16, and going on from what was saved."""
    answer = {}
    for precision in ("bf16-mixed", "bf16-true"):
        for stage in (1, 2, 3):
            make = divided if stage == 3 else lambda stage=stage: DeepSpeedStrategy(stage)
            run = Run(rank, make(), precision)
            losses = [float(r.loss) for r in run.train(10)]
            state = run.state()
            run.train(10, start=10)
            end = run.state()
            run.close()
            again = resumed(rank, make(), state, precision)
            answer[precision, stage] = {
                "losses": losses, "state": state, "end": end, "again": again["end"],
            }  # fmt: skip
        answer[precision, "ddp"] = trained(rank, DDPStrategy(), precision)
    return answer


def offloaded(rank):
    """State that waits in host memory, updated by a torch optimizer."""
    import warnings

    answer = {"ddp": trained(rank, DDPStrategy(), accumulate=3)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer[2] = trained(rank, DeepSpeedStrategy(2, offload_optimizer="cpu"), accumulate=3)
        strategy = DeepSpeedStrategy(3, offload_optimizer="cpu", offload_parameters="cpu")
        answer[3] = trained(rank, strategy, accumulate=3)
    answer["notices"] = [str(w.message) for w in caught if "offloaded" in str(w.message)]
    return answer


def evaluated(rank):
    """At stage 3 with everything divided: ranks evaluate other numbers of batches, then train."""
    run = Run(rank, divided())
    run.train(4)
    spec = EvalSpec(run.module, loss, inference_mode=True)
    batches = [window[0] for window in windows(0, 3)]
    with run.strategy.eval_step(spec) as step:
        found = [float(step(batch)) for batch in batches[: 3 - 2 * rank.world.rank]]
    held = sum(p.numel() for p in run.module.parameters())
    run.train(4, start=4)
    state = run.state()
    run.close()
    plain = Run(rank, DDPStrategy())
    plain.train(4)
    with plain.strategy.eval_step(EvalSpec(plain.module, loss)) as step:
        wanted = [float(step(batch)) for batch in batches]
    plain.train(4, start=4)
    answer = {"found": found, "wanted": wanted, "held": held}
    answer["states"] = (state, plain.state())
    plain.close()
    return answer


def frozen(rank):
    """A layer that is not trained, in a state with and without it."""
    answer = {}
    for stage in (0, 2, 3):
        for without in (False, True):
            module = network(rank.world.rank)
            module[0].requires_grad_(False)
            config = ALL_DIVIDED if stage == 3 else None
            strategy = DeepSpeedStrategy(stage, config=config, exclude_frozen_parameters=without)
            run = Run(rank, strategy, module=module, make=trained_ones)
            run.train(5)
            state = run.state()
            run.train(5, start=5)
            end = run.state()
            run.close()
            again = network(0)
            again[0].requires_grad_(False)
            run = Run(rank, strategy, module=again, make=trained_ones)
            run.strategy.load(ModelState(*state))
            run.train(5, start=5)
            answer[stage, without] = {"state": state, "end": end, "again": run.state()}
            run.close()
    return answer


def trained_ones(module):
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)


def scheduled(rank):
    """A scheduler in DeepSpeed's configuration, over a resume."""
    config = {
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 8, "warmup_type": "linear"},
        }
    }
    run = Run(rank, DeepSpeedStrategy(1, config=config))
    rates = []
    for number in range(6):
        run.train(1, start=number)
        rates.append(run.optimizer.param_groups[0]["lr"])
    state = run.state()
    run.train(2, start=6)
    end = run.optimizer.param_groups[0]["lr"]
    run.close()
    run = Run(rank, DeepSpeedStrategy(1, config=config))
    run.strategy.load(ModelState(*state))
    run.train(2, start=6)
    answer = {"rates": rates, "end": end, "again": run.optimizer.param_groups[0]["lr"]}
    run.close()
    return answer


def memory(rank):
    """Bytes of parameters, gradients in flight and optimizer state that this rank holds."""
    answer = {}
    for stage in (0, 1, 2, 3):
        strategy = DeepSpeedStrategy(stage, config=ALL_DIVIDED if stage == 3 else None)
        module = nn.Sequential(nn.Linear(16, 512), nn.Tanh(), nn.Linear(512, 3))
        kept = []
        hooks = StepHooks(
            after_backward=lambda module=module, kept=kept: kept.append(grads(module))
        )
        run = Run(rank, strategy, module=module, hooks=hooks)
        run.train(2)
        optimizer = run.optimizer
        moments = sum(
            value.numel()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        held = sum(p.numel() for p in run.module.parameters())
        answer[stage] = {"moments": moments, "parameters": held, "gradients": max(kept)}
        run.close()
    return answer


#: Small against the model, so that what is on its way counts little.
NARROW = {"reduce_bucket_size": 20_000, "stage3_param_persistence_threshold": 0}
WIDE, LAYERS = 128, 24


def live(rank):
    """The bytes of all tensors of this rank after a backward, for one of the model, by stage."""
    answer = {}
    for stage in (0, 1, 2, 3):
        module = nn.Sequential(*(nn.Linear(WIDE, WIDE) for _ in range(LAYERS)))
        whole = 4 * sum(p.numel() for p in module.parameters())
        before = bytes_of_tensors()
        found = []
        hooks = StepHooks(after_backward=lambda found=found: found.append(bytes_of_tensors()))
        config = {"zero_optimization": NARROW} if stage else None
        bound = rank.bind_object(DeepSpeedStrategy(stage, config=config))
        module = bound.prepare(module)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        step = bound.train_step(
            StepSpec(module, [optimizer], lambda m, x: m(x).square().mean(), hooks=hooks)
        )
        for _ in range(3):
            step([torch.ones(4, WIDE)])
        bound.close()
        answer[stage] = (found[-1] - before + whole) / whole
        del step, optimizer, module, bound
    return answer


def bytes_of_tensors():
    """What all tensors of this process hold, each memory once, gradients included."""
    gc.collect()
    held = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):
            grad = found.grad if found.is_leaf else None
            for tensor in (found, grad):
                if tensor is not None and not tensor.is_meta:
                    storage = tensor.untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def versions(rank):
    """Ranks with different versions of DeepSpeed, and what each says to it."""
    import deepspeed

    kept = deepspeed.__version__
    deepspeed.__version__ = f"0.19.{7 + rank.world.rank}"
    try:
        Run(rank, DeepSpeedStrategy(1))
    except ClusterError as error:
        return error.message
    finally:
        deepspeed.__version__ = kept
    return ""


def grads(module):
    """Elements of gradients that lie on parameters after backward."""
    return sum(p.grad.numel() for p in module.parameters() if p.grad is not None)
