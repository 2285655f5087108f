COEFFICIENTS: tuple[str, ...]
STEP_KINDS: dict[str, int]
DEFAULTS: dict[str, float]

def check_hyperparameter(name: str, value: float, where: str = "") -> None: ...

class ScheduleStep:
    @property
    def coefs(self) -> tuple[float, ...]: ...
    def store_coefs(self, out: object) -> None: ...
    @property
    def k(self) -> int: ...
    @property
    def weight_sum(self) -> float: ...
    @property
    def lr_max(self) -> float: ...
    @property
    def scheduled_lr(self) -> float: ...
    @property
    def c(self) -> float: ...
    @property
    def beta(self) -> float: ...

def schedule_step(
    *,
    kind: int,
    k: int,
    weight_sum: float,
    lr_max: float,
    scheduled_lr: float = 0.0,
    lr: float,
    weight_decay: float = 0.0,
    beta: float,
    beta_next: float,
    warmup_steps: float = 0.0,
    c_warmup: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    decoupling_c: float = 0.0,
    averaging_weight: float = 0.0,
    lr_factor: float = 1.0,
    beta2: float = 0.0,
    eps: float = 0.0,
    inner_momentum: float = 0.0,
    silent_sgd_phase: bool = True,
    maximize: bool = False,
    stochastic: bool = False,
    max_grad_norm: float | None = None,
    grad_norm: float = 0.0,
) -> ScheduleStep: ...
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
def y_to_x_weight(beta: float) -> tuple[float, float]: ...
def x_to_y_weight(beta: float) -> tuple[float, float]: ...
def version() -> str: ...
def compiler() -> str: ...
def min_torch() -> str: ...
def cuda_build() -> str: ...
def load_cuda() -> str | None: ...
def cpu_isa() -> str: ...
