from typing import Any

from torch import Tensor

_Batch = tuple[list[Tensor], list[Tensor], list[dict[str, Any]], bool, bool]

class ScheduleStep:
    @property
    def lr(self) -> float: ...
    @property
    def c(self) -> float: ...
    @property
    def w(self) -> float: ...
    @property
    def a(self) -> float: ...
    @property
    def k(self) -> int: ...
    @property
    def weight_sum(self) -> float: ...
    @property
    def lr_max(self) -> float: ...

def advance(
    *,
    k: int,
    weight_sum: float,
    lr_max: float,
    lr: float,
    lr_factor: float,
    warmup_steps: int,
    c_warmup: int = 0,
    r: float,
    weight_lr_power: float,
    beta: float,
    beta_next: float,
) -> ScheduleStep: ...
def step_factors(
    *,
    kind: int,
    k: int,
    beta2: float = 0.0,
    eps: float = 0.0,
    inner_momentum: float = 0.0,
    silent_sgd_phase: bool = True,
) -> tuple[float, float, float]: ...

STEP_KINDS: dict[str, int]
COEFFICIENTS: tuple[str, ...]

def clip_factor(norm: float, max_norm: float) -> float: ...
def annealed_beta(*, k: int, beta: float, beta_max: float, anneal_steps: int) -> float: ...

class PolyakStep:
    @property
    def lr_factor(self) -> float: ...
    @property
    def grad_l1_ema(self) -> float: ...
    @property
    def grad_l1_ema_corr(self) -> float: ...

def polyak_step(
    *,
    k: int,
    function_value: float,
    grad_l1: float,
    ip_term: float,
    polyak_beta: float,
    grad_l1_ema: float,
) -> PolyakStep: ...
def y_to_x_weight(beta: float) -> float: ...
def x_to_y_weight(beta: float) -> float: ...
def gather(
    params: list[Tensor],
    states: dict[Tensor, dict[str, Any]],
    grads: bool,
    check_low: bool,
    layout: object,
    keys: tuple[str, ...],
) -> tuple[list[_Batch], list[int]]: ...
def version() -> str: ...
def compiler() -> str: ...
def min_torch() -> str: ...
def cuda_build() -> str: ...
def load_cuda() -> str | None: ...
def cpu_isa() -> str: ...
