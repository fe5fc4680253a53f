"""What all agents share: settings, learning, inference, checkpoints, on SB3's `BaseAlgorithm`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from agents.callbacks import (
    remaining_timesteps,
    sync_callbacks,
    update_kl_controllers,
    watch_sampling,
    with_progress_bar,
)
from agents.checkpoint import (
    FORMAT,
    Attributes,
    CursorState,
    EnvState,
    KLCoefficient,
    NumpyGenerator,
    TorchGenerator,
    TrainingState,
    atomic_write,
    check_algorithm,
    defer_interrupt,
    migrate,
    verify_archive,
)
from agents.collection.collector import ResponseCollector, TokenCollector
from agents.collection.conversation import Conversations, check_messages
from agents.collection.evaluation import evaluate
from agents.collection.prefetch import PrefetchedRollout, check_overlap
from agents.compatibility import (
    agree_on_ends,
    check_fit,
    check_optimizer,
    check_positions,
    check_tokenizers,
    check_trainable,
    default_learning_rate,
)
from agents.distributed.communicator import SINGLE_PROCESS, Communicator, collective, get_communicator
from agents.distributed.fsdp import full_params_context, full_state_dict, is_sharded, shard_optim_state_dict, shard_state_dict
from agents.engines.base import PolicyEngine
from agents.engines.registry import check_engine, check_engine_env, make_engine
from agents.engines.weight_sync import ExternalEngine, SyncedEngine
from agents.losses import AGGREGATIONS
from agents.metrics import (
    PRINTED_SAMPLES,
    episode_infos,
    print_samples,
    record_rollout,
    record_time,
    record_update,
    samples_of,
)
from agents.policy import Evaluation, LanguagePolicy
from agents.policy.gradient_checkpointing import check_gradient_checkpointing
from agents.policy.prompt_encoding import encode_prompts
from agents.rollout import Rollout, concat
from agents.sampling.generate import OnTokens, StepState, StopRollout, ignore_tokens
from agents.sampling.sampler import Sampler
from agents.training.objective import LossTerms, Statistics
from agents.training.optimizers import check_sharding, class_of, keep_steps_on_cpu, make_optimizer
from agents.training.preflight import preflight
from agents.training.reference_sync import ReferenceSync, check_reference_sync
from agents.training.replication import replicate_policy, replicate_reference
from agents.training.trainer import Trainer
from agents.validation import (
    check_choice,
    check_counts,
    check_groups,
    check_max_num_seqs,
    check_numbers,
    check_processes,
    check_switches,
    check_tokens,
    episodes_per_rollout,
    parse_learn_args,
)
from agents.vec_env import DEFAULT_N_ENVS, as_vec_env, rules_of_vec_env, unique_rules, vector_env_of
from llm_env.arguments import check_int
from llm_env.keywords import check_keywords
from llm_env.lm.compiling import num_compiled_graphs
from llm_env.lm.sharing import PrefixSharing
from llm_env.model_names import check_model_name
from llm_env.observations import Observation
from llm_env.prompts import PromptCursor
from llm_env.reference import BaseReference, KLController, coefficient
from llm_env.report import Report
from llm_env.rewards import TrainerState
from llm_env.rules import Rules
from llm_env.stops import StopStrings, special_tokens
from llm_env.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from agents.diagnostics import Playback

SelfAgent = TypeVar("SelfAgent", bound="LanguageAgent")
DEFAULT_TIMESTEPS = 100_000
DEFAULT_GROUP_SIZE = 8
DEFAULT_IMPORTANCE_CAP = 2.0  # where another engine or older weights generate
NOT_SAVED = ("tokenizer", "peft_config")  # of `policy_kwargs`: the policy has them
STOPPING = "Ctrl-C: stopping after this update; press it again to stop at once"
STOPPED_WITHIN_UPDATE = (
    "Ctrl-C: stopped in the middle of an update. The rest of its optimizer steps are lost: training that resumes from here "
    "does not reach the weights of an uninterrupted run. Load the last checkpoint for that"
)
NOT_SHOWN = ("env", "n_envs", "device", "policy_kwargs", "stats_window_size", "verbose", "_init_setup_model")
LIVE = (  # attributes that are not in a checkpoint
    "_model",
    "_tokenizer",
    "_peft_config",
    "_generator",
    "np_random",
    "_cursor",
    "_last_obs",
    "_last_episode_starts",
    "_state",
    "_reference_weights",
    "_prefetched",
    "_preflighted",
    "_on_tokens",
    "_samples",
    "_engine",
    "_reference_sync",
    "on_iteration",
    "communicator",
    "_conversations",
)


class CommonArguments(TypedDict, total=False):
    """Keyword arguments that every algorithm passes on; `LanguageAgent` documents them."""

    n_envs: int | None
    batch_size: int | None
    micro_batch_size: int | None
    max_tokens_per_batch: int | None
    preflight: bool
    max_grad_norm: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    max_num_seqs: int | None
    prefix_sharing: PrefixSharing
    bf16: bool
    compile: bool
    overlap: bool
    importance_cap: float | None
    gradient_checkpointing: bool
    optimizer: str
    engine: str | ExternalEngine | None
    engine_kwargs: dict[str, Any] | None
    mask_truncated: bool
    stats_window_size: int | None
    tensorboard_log: str | None
    policy_kwargs: dict[str, Any] | None
    verbose: int
    seed: int | None
    device: torch.device | str
    _init_setup_model: bool


class LanguageAgent(BaseAlgorithm):
    """Trains a causal language model on a text env; the algorithms fill in `compute_advantages` and `loss`.

    One timestep is one action token. A rollout is `n_envs` episodes; `n_epochs` passes over it are cut into minibatches of
    `batch_size` episodes, one optimizer step each. The agent holds the settings, and builds from them the components that do
    the work: a collector with an engine (`agents.collection`, `agents.engines`) and a trainer (`agents.training`), whose
    `Objective` it is.

    Args:
        policy: a path, a hub id, a `PreTrainedModel` or a `LanguagePolicy`; or the folder of a LoRA adapter, to train it on. Of
            a model object, parameters with `requires_grad=False` stay as they are; a quantized model needs an adapter.
        env: a text env, its id, or an SB3 VecEnv over text envs; may be given to `learn` instead.
        learning_rate: a number or an SB3 schedule. None takes 3e-4 for a model of a million parameters, 1e-6 for one of a
            billion, and a power law between them, divided by `n_epochs`, because passes over the same episodes add up; ten
            times that for an adapter.
        n_envs: episodes in a rollout; 64, or the rows of a vector env, by default.
        n_epochs: passes over a rollout.
        batch_size: episodes in an optimizer step, whole groups where it is a multiple of them; the whole rollout by default.
        micro_batch_size: episodes in a forward pass; bounds the memory and changes nothing else. `batch_size` by default.
        max_tokens_per_batch: tokens in a forward pass: prompts, each counted as often as it is computed, responses and padding.
            Also bounds the memory. By default 2048 (or one group) on a CPU, where more is slower, and no bound elsewhere.
        preflight: try on a GPU before the first rollout whether the longest pass fits into memory; see
            `agents.training.preflight.preflight`.
        max_grad_norm: the gradient is scaled down to this norm.
        temperature: divides the logits, in sampling and in training.
        top_k, top_p, min_p: restrict the sampling (off by default); the training is then off-policy, and says so.
        max_num_seqs: responses that are sampled at a time, at least a group: bounds the memory. All by default.
        prefix_sharing: compute a prompt once for all responses to it: "auto" where the model can and it is less work, True or
            False; see `llm_env.lm.sharing`.
        bf16: matrix products in bfloat16, under autocast; weights, log-probs and losses stay float32. On a GPU, responses are
            sampled with a copy of the weights in bfloat16, which takes two bytes a weight.
        compile: compile the model's layers with `torch.compile`, for sampling and training: faster on a GPU after a minute of
            compiling, which needs a C++ compiler; see `llm_env.lm.compiling`.
        overlap: generate the next rollout during the update; see `agents.collection.prefetch`.
        importance_cap: weigh a token's advantage by min(pi/pi_sampled, importance_cap), pi by the training path before the
            update: corrects for the difference between training and sampling path; see `agents.losses.truncated_importance`. By
            default 2 where another engine, older weights or a copy of them in bfloat16 (`bf16` on a GPU) generate, else off.
        gradient_checkpointing: keep only the inputs of the model's layers for the backward pass, which computes the layers
            again: less memory, more time, the same gradient. Sampling is as fast as without.
        optimizer: `"adamw_torch"`, or one of bitsandbytes: `"adamw_8bit"` stores each of the two moments in one byte a weight,
            `"paged_adamw_8bit"` also moves them to the CPU when the GPU is full. `policy_kwargs` takes any other class.
        engine: generates the responses in training: None for the policy itself, `"vllm"`, or an object like
            `agents.engines.weight_sync.ExternalEngine`. Evaluation, `predict` and `generate` use the policy.
        engine_kwargs: arguments of `agents.engines.vllm.engine.VLLMEngine`, for instance `base_url`.
        aggregation: how token losses become one number; see `agents.losses.token_weights`.
        mask_truncated: leave responses that the length limit ended out of the loss; their rewards count as before.
        stats_window_size: episodes over which `rollout/` means are taken; those of the last rollout by default.
        tensorboard_log: folder for TensorBoard.
        policy_kwargs: `tokenizer` (for a model object), `optimizer_class` and `optimizer_kwargs`; `peft_config` trains a LoRA
            adapter and a value head instead of all weights, see `agents.policy.LanguagePolicy`.
        verbose: 0 silent, 1 a table of the logs after every rollout.
        seed: seeds sampling, minibatches and the order of the prompts.
        device: "auto" takes CUDA where there is a GPU.

    Raises:
        ValueError, TypeError: If an argument is unusable, or env and model do not fit; the message says what to change.
    """

    policy: LanguagePolicy
    np_random: np.random.Generator
    communicator: Communicator = SINGLE_PROCESS
    needs_old_logp = True
    needs_values = False
    separate_critic = False
    group_size = 1
    adam_epsilon = 1e-8
    kl_coef: float | KLController = 0.0  # in the loss
    max_resamples = 0
    reference_every: int | None = None
    on_iteration: Callable[[Any, list[Rollout]], None] | None = None
    state_attributes: tuple[str, ...] = ()  # of the algorithm, that an update moves
    engine_kwargs: dict[str, Any] | None = None
    _engine_setting: Any = None
    _engine_is_object = False
    _engine: PolicyEngine | SyncedEngine | None = None
    _prefetched: PrefetchedRollout | None = None
    _preflighted: tuple[object, ...] | None = None
    _samples: Sequence[dict[str, str]] = ()  # of the last rollout, for the console
    _on_tokens: OnTokens = staticmethod(ignore_tokens)  # of the callbacks, while learning
    _had_hook = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse unknown keyword arguments in the name of the class that the user called."""
        if (known := _keywords_of(cls)) is not None:
            others = {kind.__name__: _keywords_of(kind) or set() for kind in LanguageAgent.__subclasses__()}
            env = {"the env": set(inspect.signature(Rules.__init__).parameters)}
            learn = {"learn": set(inspect.signature(cls.learn).parameters)}
            check_keywords(cls.__name__, kwargs, known, env | learn | others)
        return super().__new__(cls)

    def __init__(
        self,
        policy: str | PreTrainedModel | LanguagePolicy | type[LanguagePolicy],
        env: Any = None,
        learning_rate: float | Schedule | None = None,
        *,
        n_envs: int | None = None,
        n_epochs: int = 1,
        batch_size: int | None = None,
        micro_batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        preflight: bool = True,
        max_grad_norm: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        max_num_seqs: int | None = None,
        prefix_sharing: PrefixSharing = "auto",
        bf16: bool = False,
        compile: bool = False,
        overlap: bool = False,
        importance_cap: float | None = None,
        gradient_checkpointing: bool = False,
        optimizer: str = "adamw_torch",
        engine: str | ExternalEngine | None = None,
        engine_kwargs: dict[str, Any] | None = None,
        aggregation: str = "token",
        mask_truncated: bool = False,
        stats_window_size: int | None = None,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        check_model_name(policy, "policy")
        if seed is not None:
            seed = check_int("seed", seed, 0, 2**32 - 1)  # what numpy's global generator takes, which SB3 seeds too
        if not isinstance(policy_kwargs or {}, dict):
            raise TypeError(f"policy_kwargs={policy_kwargs!r} must be a dict")
        self.communicator = get_communicator()
        super().__init__(
            policy=LanguagePolicy,
            env=None,
            learning_rate=0.0 if learning_rate is None else learning_rate,
            policy_kwargs={key: value for key, value in (policy_kwargs or {}).items() if key not in NOT_SAVED},
            stats_window_size=stats_window_size or DEFAULT_N_ENVS,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=self.communicator.device if device == "auto" and self.communicator.device is not None else device,
            support_multi_env=True,
            seed=self.communicator.broadcast_seed(seed),
        )
        if self.device.type == "cpu" and torch.device("cpu" if device == "auto" else device).type == "cuda":
            warn(f"device={str(device)!r}, but torch finds no GPU; computing on cpu")
        check_counts(n_envs=n_envs, n_epochs=n_epochs, batch_size=batch_size, stats_window_size=stats_window_size)
        check_counts(micro_batch_size=micro_batch_size, max_tokens_per_batch=max_tokens_per_batch, max_num_seqs=max_num_seqs)
        check_switches(preflight=preflight, overlap=overlap, bf16=bf16, compile=compile)
        check_switches(gradient_checkpointing=gradient_checkpointing)
        check_choice("prefix_sharing", prefix_sharing, ("auto", True, False))
        check_max_num_seqs(max_num_seqs, self.group_size)
        class_of(optimizer)  # raises for an unknown one
        check_numbers(0.0, max_grad_norm=max_grad_norm)
        check_numbers(1.0, importance_cap=importance_cap)
        check_choice("aggregation", aggregation, AGGREGATIONS)
        Sampler(temperature, top_k, top_p, min_p=min_p)  # raises for unusable values
        if n_envs is not None:
            check_groups(self.group_size, n_envs)
        self._model = policy
        self._tokenizer, self._peft_config = ((policy_kwargs or {}).get(name) for name in NOT_SAVED)
        self._n_envs_setting = n_envs
        self._learning_rate_setting = learning_rate
        self.n_envs = n_envs or self.group_size * -(-DEFAULT_N_ENVS // self.group_size)
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.preflight = preflight
        self.max_grad_norm = max_grad_norm
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.max_num_seqs = max_num_seqs
        self.prefix_sharing = prefix_sharing
        self.bf16 = bf16 or self.communicator.bf16
        self.compile = compile
        self.overlap = overlap
        self.importance_cap = importance_cap
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer = optimizer
        self.set_engine(engine, engine_kwargs)
        self.aggregation = aggregation
        self.mask_truncated = mask_truncated
        self._window_is_rollout = stats_window_size is None
        self._policy_data: dict[str, Any] = {}
        self._saved_state: dict[str, Any] = {}
        self._reference_weights: dict[str, Any] | None = None
        self._tokens_left_over = 0
        self._has_had_env = False
        self._had_hook = self.on_iteration is not None
        self._name_algorithm()
        if _init_setup_model:
            self._setup_model()
            if env is not None:
                self._set_env(as_vec_env(env, self.n_envs))

    def _name_algorithm(self) -> None:
        self._algorithm = type(self).__name__  # the class that writes a checkpoint
        self._algorithms = [parent.__name__ for parent in type(self).__mro__]  # and those that it is derived from

    def __repr__(self) -> str:
        """Describe the agent in five lines."""
        parameters = list(self.policy.parameters())
        trained, total = (sum(p.numel() for p in ps) for ps in ([p for p in parameters if p.requires_grad], parameters))
        defaults = {p.name: p.default for kind in (LanguageAgent, type(self)) for p in _parameters_of(kind)}
        values = {name: getattr(self, name) for name in defaults if name not in NOT_SHOWN and hasattr(self, name)}
        values["engine"] = self._engine_setting
        settings = ", ".join(f"{name}={_short(value)}" for name, value in values.items() if _differs(value, defaults[name]))
        env = "none yet"
        if self.env is not None:
            env = f"{self.rules.describe()}, {type(self.env).__name__}"
        return "\n".join(
            [
                f"{type(self).__name__}",
                f"  model: {type(self.policy.base).__name__}, {trained:,} of {total:,} parameters trained, on {self.device}",
                f"  env: {env}, n_envs={self.n_envs}",
                f"  settings: {settings or 'the defaults'}",
                f"  trained: {self.num_timesteps:,} timesteps, {self._n_updates:,} optimizer steps",
            ]
        )

    # --- what an algorithm fills in: see `agents.training.objective.Objective` -------------------------------------------

    def check_env(self, rules: Rules) -> None:
        """Check that an env can serve the algorithm's arguments; raise a ValueError if it cannot."""

    def needs_more(self, rollouts: list[Rollout]) -> bool:
        """Return whether another rollout is to be collected before the update."""
        return False

    def select_training_rows(self, rollout: Rollout) -> list[int] | None:
        """Return which of the sampled episodes are trained on; None for all."""
        return None

    def compute_advantages(self, rollout: Rollout) -> None:
        """Set `rollout.advantages`, and `rollout.returns` where there is a value head."""
        raise NotImplementedError

    def loss(self, batch: Rollout, evaluation: Evaluation, weights: Tensor) -> tuple[LossTerms, Statistics]:
        """Compute the loss of one micro-batch; see `agents.training.objective.Objective.loss`."""
        raise NotImplementedError

    def should_stop(self, statistics: dict[str, float]) -> bool:
        """Return whether the policy has moved far enough for this rollout."""
        return False

    # --- learning ----------------------------------------------------------------------------------------------------

    @collective
    def learn(  # type: ignore[override]
        self: SelfAgent,
        env_or_timesteps: Any = None,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        total_timesteps: int | None = None,
        env: Any = None,
    ) -> SelfAgent:
        """Train for at least `total_timesteps` action tokens, in whole rollouts.

        The callback's `on_step` is called once every `env.num_envs` tokens, as in SB3. A rollout in which a callback asks to
        stop, or that an error or Ctrl-C ends early, is neither trained on nor counted. An update is not interrupted: Ctrl-C
        takes effect after it, and a second Ctrl-C at once.

        Resuming (`reset_num_timesteps=False`), in this process or from a file, gives the weights of a run that was never
        stopped: the overshoot of one call counts towards the next, so that twice k tokens are 2k. A schedule runs over all
        tokens requested so far: it is at its end after k, so that only a run of 2k that is stopped at n and resumes for
        2k - n equals the uninterrupted one. SB3's callbacks count `on_step` from when they were made, and `iteration` from the
        call.

        Args:
            env_or_timesteps: an env to train on, as in `learn(env)`, or `total_timesteps`, as in SB3.
            callback: SB3 callbacks; or a number, `total_timesteps`, as in `learn(env, 10_000)`.
            log_interval: rollouts between two dumps of the logs; None for none.
            tb_log_name: name of the run for TensorBoard; the algorithm's by default.
            reset_num_timesteps: count from 0 and begin a new TensorBoard run; False resumes, in the latest run of that name.
            progress_bar: show one (needs rich and tqdm).
            total_timesteps: number of action tokens; 100,000 by default.
            env: an env to train on.
        """
        check_counts(log_interval=log_interval)
        env, callback, total_timesteps = parse_learn_args(env_or_timesteps, callback, total_timesteps, env)
        if env is not None:
            self._set_env(as_vec_env(env, self.n_envs))
        self._configure()
        check_overlap(self.overlap, self.env is None or vector_env_of(self.env) is not None, self.communicator.sharded)
        check_optimizer(self.policy)
        self._run_preflight()
        if progress_bar and self.communicator.is_main_process:
            callback = with_progress_bar(callback)
        requested = DEFAULT_TIMESTEPS if total_timesteps is None else total_timesteps
        with warnings.catch_warnings():  # EvalCallback compares the classes of VecEnvs: all of text envs serve
            warnings.filterwarnings("ignore", "Training and eval env are not of the same type")
            total_timesteps, callback = self._setup_learn(
                remaining_timesteps(requested, self.num_timesteps, self._total_timesteps, reset_num_timesteps),
                callback,
                reset_num_timesteps,
                tb_log_name or type(self).__name__,
            )
        sync_callbacks(callback, self.policy, self.communicator, self.seed)
        self._on_tokens = watch_sampling(callback)
        callback.on_training_start(locals(), globals())
        iteration = 0
        try:
            while self.num_timesteps < total_timesteps:
                # Before collecting: a rollout ends past the total, where a schedule would be 0 or less.
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                callback.on_rollout_start()
                self._sync_rng()
                self._update_trainer_state()
                steps = self.policy.num_steps
                is_final = lambda: self.policy.num_steps != steps  # noqa: B023, E731 - called within this iteration only
                began = self._training_state()
                with self._state.rollback_on_error(began, self._discard_prefetched, is_final) as transaction:
                    rollout = self.sample_rollout()
                    update_kl_controllers((self.rules.kl, self.kl_coef), rollout)
                    if not self._run_callbacks(callback, rollout):
                        transaction.roll_back()
                        break
                    callback.on_rollout_end()
                    self._record_rollout(rollout)
                    if self.overlap and self.num_timesteps < self._total_timesteps:
                        self._prefetched = self._prefetch()
                    with defer_interrupt(STOPPING, STOPPED_WITHIN_UPDATE):
                        self._state.began = None  # from here on a checkpoint has what the update has done
                        self.train(rollout)
                        transaction.is_committed = True
                iteration += 1
                if log_interval is not None and (self.num_timesteps >= total_timesteps or iteration % log_interval == 0):
                    self.dump_logs(iteration)
        except StopRollout:
            pass
        except BaseException:  # also KeyboardInterrupt: write what was logged so far, then re-raise
            with suppress(OSError):  # the error under way matters more
                self.logger.dump(self.num_timesteps)
            raise
        finally:
            self._on_tokens = ignore_tokens
            self._cancel_prefetch()
            callback.on_training_end()
        return self

    def sample_rollout(self) -> Rollout:
        """Collect the next rollout: `n_envs` episodes, and more where the algorithm resamples."""
        prefetched, self._prefetched = self._prefetched, None
        collector = self._make_collector()
        rollouts = [collector.collect() if prefetched is None else prefetched.result()]
        while self.needs_more(rollouts):
            rollouts.append(collector.collect())
        return rollouts[0] if len(rollouts) == 1 else concat(rollouts)

    def train(self, rollout: Rollout) -> None:
        """Update the policy on a rollout, and every `reference_every` rollouts the reference; log `train/` entries."""
        self._update_learning_rate(self.policy.optimizer)
        rows = self.select_training_rows(rollout)
        trained = rollout if rows is None else rollout.select(rows)
        statistics = self.make_trainer().train(trained)
        record_update(self.logger, trained, statistics, self._n_updates)
        self._sync_reference(rollout)

    def make_trainer(self) -> Trainer:
        """Build the trainer from the agent's attributes as they are now."""
        return Trainer(
            self.policy,
            self,
            self.communicator,
            self.policy.optimizer,
            self.np_random,
            self.rules,
            n_epochs=self.n_epochs,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            max_tokens_per_batch=self.max_tokens_per_batch,
            max_grad_norm=self.max_grad_norm,
            temperature=self.temperature,
            aggregation=self.aggregation,
            mask_truncated=self.mask_truncated,
            importance_cap=self.importance,
            on_step=self._count_step,
        )

    def _count_step(self) -> None:
        self._n_updates += 1

    def _make_collector(self) -> ResponseCollector | TokenCollector:
        """Build the collector from the agent's attributes as they are now: of whole responses where the env allows it."""
        assert self.env is not None
        venv = vector_env_of(self.env)
        if venv is None:
            return TokenCollector(
                self.policy,
                self.env,
                self.sampler(),
                self.group_size,
                self.communicator,
                self._next_indexes,
                self._on_tokens,
            )
        return ResponseCollector(
            self.policy, self.engine, venv, self.sampler(), self.group_size, self.communicator, self._on_tokens
        )

    def _next_indexes(self) -> list[int]:
        groups = [self._cursor.next() for _ in range(self.n_envs // self.group_size)]
        return [index for index in groups for _ in range(self.group_size)]

    def _prefetch(self) -> PrefetchedRollout:
        """Begin to generate the next rollout with the weights as they are now."""
        assert self.env is not None
        venv, began, sampler = vector_env_of(self.env), self._state.snapshot(), self.sampler()
        assert venv is not None
        if not self.engine.takes_uniforms:
            sampler = sampler.spawn(0)  # the update draws from the agent's own generator meanwhile
        frozen = self.engine.snapshot(self.rules)
        return PrefetchedRollout(
            ResponseCollector(self.policy, frozen, venv, sampler, self.group_size, self.communicator, self._on_tokens), began
        )

    def _discard_prefetched(self) -> None:
        """Wait for the rollout that is being prefetched, and drop it."""
        if self._prefetched is not None:
            self._prefetched.wait()
            self._prefetched = None

    def _cancel_prefetch(self) -> None:
        """Drop the rollout that is being prefetched; its prompts and random numbers are drawn again."""
        if self._prefetched is not None:
            began = self._prefetched.began
            self._discard_prefetched()
            self._state.restore(began)

    def _sync_reference(self, rollout: Rollout) -> None:
        """After every `reference_every` rollouts, make the policy the reference and call `on_iteration`."""
        if self._had_hook and self.on_iteration is None:
            self._had_hook = False
            warn(
                "this agent was saved with an on_iteration hook, which is not in the file and is not called any more. Load it "
                f"with {type(self).__name__}.load(path, env=env, on_iteration=hook)"
            )
        if self.reference_every is not None and self._prefetched is not None:
            self._prefetched.wait()  # it reads this reference
        reference, keep = self.rules.reference, self.on_iteration is not None
        rollouts = self._reference_sync.after_update(self.policy, reference, self.reference_every, rollout, keep)
        if rollouts is not None and self.on_iteration is not None:
            self.on_iteration(self, rollouts)

    def _run_callbacks(self, callback: BaseCallback, rollout: Rollout) -> bool:
        """Count the tokens of a rollout and call `on_step` once every `env.num_envs` of them; False if it asked to stop.

        Tokens left over from a rollout count towards the first call of the next.
        """
        assert self.env is not None
        rows = self.env.num_envs
        infos, rewards = episode_infos(rollout, self.start_time), rollout.scores.cpu().numpy()
        dones = np.ones(len(rollout), dtype=bool)
        self._update_info_buffer(infos, dones)
        new = int(rollout.num_actions.sum())
        calls = max(1, (self._tokens_left_over + new) // rows)
        self._tokens_left_over = max(0, self._tokens_left_over + new - calls * rows)
        end = self.num_timesteps + new
        goes_on, error = True, None
        try:
            for call in range(1, calls + 1):
                last = call == calls
                self.num_timesteps = end if last else min(end, self.num_timesteps + rows)
                callback.update_locals(
                    {"dones": dones if last else ~dones, "infos": infos if last else [{}] * len(infos), "rewards": rewards}
                )
                goes_on = callback.on_step() and goes_on
                if (
                    not goes_on and self.communicator.size == 1
                ):  # else other processes may be in a collective of a callback's next call
                    break
        except Exception as raised:
            error = raised
        return all(self.communicator.gather_or_raise(goes_on, error))

    def _update_trainer_state(self) -> None:
        """Set what reward functions may ask for as `trainer_state`."""
        done, steps = min(1.0, self.num_timesteps / max(1, self._total_timesteps)), self._n_updates
        planned = round(steps / done) if done else 1
        self.rules.rewards.trainer_state = TrainerState(steps, max(1, steps, planned), done, 1, self.num_timesteps)

    def _sync_rng(self) -> None:
        """Take over the main process's random states: another process may have drawn numbers for itself."""
        if self.communicator.size == 1:
            return
        torch_state, numpy_state = self.communicator.broadcast_from_main(
            (self._generator.get_state(), self.np_random.bit_generator.state)
        )
        self._generator.set_state(torch_state)
        self.np_random.bit_generator.state = numpy_state

    def _run_preflight(self) -> None:
        """Try the longest pass, unless that was done with the limits as they are now."""
        longest = self.rules.longest_prompt, self.rules.max_episode_tokens
        sizes = self.n_envs, self.batch_size, self.micro_batch_size, self.max_tokens_per_batch
        limits = (*longest, *sizes, self.device, self.gradient_checkpointing)
        if self._preflighted != limits:
            preflight(self.make_trainer(), self.rules, self.n_envs, is_on=self.preflight)
            self._preflighted = limits

    def _record_rollout(self, rollout: Rollout) -> None:
        assert self.ep_info_buffer is not None and self.ep_success_buffer is not None
        self._samples = samples_of(rollout, self.rules, PRINTED_SAMPLES) if self.verbose else []
        record_rollout(
            self.logger,
            rollout,
            self.rules,
            episodes=self.ep_info_buffer,
            successes=self.ep_success_buffer,
            kl_in_loss=coefficient(self.kl_coef),
            resamples=len(rollout) // self.n_envs - 1 if self.max_resamples else None,
            engine=self.engine,
        )

    def dump_logs(self, iteration: int = 0) -> None:
        """Write what has been recorded to the logger's outputs."""
        new_timesteps = self.num_timesteps - self._num_timesteps_at_start
        record_time(self.logger, iteration, self.num_timesteps, new_timesteps, self.start_time)
        if self.compile:
            self.logger.record("time/compiled_graphs", num_compiled_graphs())
        try:
            self.logger.dump(self.num_timesteps)
        except OSError as error:  # TensorBoard's writer does not name its file
            raise OSError(
                error.errno,
                f"{error.strerror or error}; the logs were not written. The last update is kept: save the agent to go on",
                error.filename or self.logger.dir,
            ) from error
        if self._samples:
            print_samples(self._samples)
            self._samples = []

    def set_logger(self, logger: Logger) -> None:
        """Set the logger; of several processes the main one logs."""
        super().set_logger(logger if self.communicator.is_main_process else Logger(None, []))

    @property
    def importance(self) -> float | None:
        """The cap of the importance weights; None where there are none."""
        is_off_policy = self.overlap or self._engine_setting is not None or self.policy.samples_in_bf16
        return DEFAULT_IMPORTANCE_CAP if self.importance_cap is None and is_off_policy else self.importance_cap

    # --- the engine --------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> PolicyEngine | SyncedEngine:
        """What generates the responses in training.

        Raises:
            ValueError: If the agent was loaded from a file, and its engine was an object, which is not in it.
        """
        if self._engine is None:
            if self._engine_setting is not None:
                self._engine = make_engine(self._engine_setting, self.engine_kwargs)
            elif self._engine_is_object:
                raise ValueError(
                    "the agent was trained with an engine object, which is not in its file; call agent.set_engine(engine), "
                    "or agent.set_engine(None) to let the policy generate"
                )
            else:
                self._engine = PolicyEngine(self.policy)
        self._engine.update_weights(self.policy)
        return self._engine

    def set_engine(self, engine: str | ExternalEngine | None, engine_kwargs: dict[str, Any] | None = None) -> None:
        """Generate with another engine from here on, or with the policy (None); one that the agent made itself is closed.

        Raises:
            ImportError: If vLLM is to run in this process and is not installed.
            ValueError, TypeError: If there is no such engine, or it does not fit the env.
        """
        check_engine(engine, engine_kwargs)
        made = None if engine is None else make_engine(engine, engine_kwargs)
        if self.env is not None:
            check_engine_env(engine, self.rules, vector_env_of(self.env) is not None, self.communicator.sharded)
        if self._engine is not None and not self._engine_is_object:
            self._engine.close()
        self._engine_setting, self.engine_kwargs, self._engine = engine, engine_kwargs, made
        self._engine_is_object = engine is not None and not isinstance(engine, str)

    def sampler(self, deterministic: bool = False) -> Sampler:
        """Return how tokens are sampled in training."""
        return Sampler(self.temperature, self.top_k, self.top_p, deterministic, self._generator, self.min_p)

    # --- policy and env ----------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        """Build the policy (from what the user gave, or from a checkpoint), its optimizer and the random generators."""
        migrate(vars(self))
        self.policy = self._build_policy()
        check_trainable(self.policy)
        if self.needs_values:
            self.policy.add_value_head(self.separate_critic)
        check_gradient_checkpointing(self.policy.lm, self.gradient_checkpointing)
        self.policy = self.policy.to(self.device)
        if self.policy.adapter is not None:
            self.policy.adapter.base.to(self.device)  # buffers that it does not share with the policy
        self.policy.train(False)
        quantized = self.policy.adapter is not None and self.policy.adapter.quantized
        check_sharding(self.communicator.sharded, self.optimizer, quantized)
        self._configure()
        if not self.communicator.is_main_process:
            self.verbose, self.tensorboard_log = 0, None
        replicate_policy(self.policy, self.communicator)
        if self._learning_rate_setting is None:
            self.learning_rate = self._learning_rate_setting = default_learning_rate(self.policy, self.n_epochs)
        self._setup_lr_schedule()
        trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        self.policy.optimized = frozenset(trained)
        self.policy.optimizer = make_optimizer(
            self.optimizer, self.policy_kwargs, list(trained.values()), lr=self.lr_schedule(1), eps=self.adam_epsilon
        )
        if not hasattr(self, "observation_space"):
            self.observation_space, self.action_space = self.policy.observation_space, self.policy.action_space
        self._generator = torch.Generator(device=self.device)
        self._conversations = Conversations()
        self.np_random = np.random.default_rng(self.seed)
        if self.seed is None:
            self._generator.seed()
        else:
            self.set_random_seed(self.seed)
            self._generator.manual_seed(self.seed)
        self._reference_sync = ReferenceSync()
        self._state = TrainingState(self._saved_state)
        self._saved_state = {}
        self._state.add(
            counts=Attributes(self, "num_timesteps", "_tokens_left_over", "ep_info_buffer", "ep_success_buffer"),
            objective=Attributes(self, *self.state_attributes),
            torch=TorchGenerator(self._generator),
            numpy=NumpyGenerator(self.np_random),
            kl_in_loss=KLCoefficient(lambda: self.kl_coef, is_fixed_restored=True),
            reference_sync=self._reference_sync,
        )

    def _build_policy(self) -> LanguagePolicy:
        settings = {key: value for key, value in self.policy_kwargs.items() if not key.startswith("optimizer_")}
        if self.seed is not None:
            torch.manual_seed(self.seed)  # an adapter's weights are random
        if self._policy_data:
            base = None if self._model is LanguagePolicy else self._model  # of an adapter, where `load` was given one
            return LanguagePolicy(**self._policy_data, base=base)
        if not isinstance(self._model, LanguagePolicy):
            return LanguagePolicy(self._model, self._tokenizer, peft_config=self._peft_config, **settings)
        if self._peft_config is not None:
            raise ValueError("policy is a LanguagePolicy, which is made already; give it the peft_config")
        return self._model

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Train on another env from here on; its spaces must be those of the last one (SB3's rule)."""
        vec_env = as_vec_env(env, self.n_envs)
        if self._has_had_env:
            check_for_correct_spaces(vec_env, self.observation_space, self.action_space)
        self._set_env(vec_env)

    def _set_env(self, env: VecEnv) -> None:
        """Take an env for training, after checking that it and the model fit."""
        rules, by_response = rules_of_vec_env(env), vector_env_of(env) is not None
        n_envs = episodes_per_rollout(self._n_envs_setting, self.n_envs, env.num_envs, by_response)
        check_fit(
            self.policy,
            rules,
            self.sampler(),
            n_envs=n_envs,
            group_size=self.group_size,
            max_tokens_per_batch=self.max_tokens_per_batch,
            kl_coef=coefficient(self.kl_coef),
        )
        self.check_env(rules)
        check_reference_sync(self.policy, rules.reference, self.reference_every)
        check_processes(n_envs, self.group_size, self.communicator.size)
        check_engine_env(self._engine_setting, rules, by_response, self.communicator.sharded)
        self.env, self.n_envs = env, n_envs
        self.observation_space, self.action_space = env.observation_space, env.action_space
        if self._window_is_rollout:
            self._stats_window_size = n_envs
        agree_on_ends(self.policy, env)
        self.policy.set_rules(rules)
        self._configure()
        replicate_reference(rules.reference, self.communicator)
        rules.record_apart(self.communicator.rank)  # a separate file for every process but the main one
        self._cursor = PromptCursor.over(rules.prompts, lambda: self.np_random)
        self._last_obs = None
        if self.seed is not None:
            env.seed(self.seed)
        self._state.add(
            env=EnvState(env),
            cursor=CursorState(self._cursor, len(rules.prompts)),
            kl_in_reward=KLCoefficient(lambda: rules.kl, is_fixed_restored=False),
        )
        self._restore_reference(rules)
        self._has_had_env = True

    @property
    def rules(self) -> Rules:
        """The rules of the training env.

        Raises:
            ValueError: If there is no env yet.
        """
        if self.env is None:
            raise ValueError(f"the agent has no env yet: give one to {type(self).__name__}(...), set_env(env) or learn(env)")
        return rules_of_vec_env(self.env)

    def _configure(self) -> None:
        """Let policy and reference compute as the agent's attributes say now."""
        self.policy.configure(
            bf16=self.bf16,
            gradient_checkpointing=self.gradient_checkpointing,
            prefix_sharing=self.prefix_sharing,
            max_num_seqs=self.max_num_seqs,
            compile_layers=self.compile,
        )
        if self.env is None:
            return
        if self.policy.adapter is not None:
            for rules in unique_rules(self.env):
                if isinstance(rules.reference, BaseReference):
                    rules.reference.set_model(self.policy.base, full_params_context(self.policy))
                    rules.reference.batch_size = self.micro_batch_size or self.batch_size or self.n_envs  # as in the update
        reference = self.rules.reference
        if reference is not None:
            reference.set_device(self.device)
            reference.temperature, reference.bf16 = self.temperature, self.bf16
            reference.prefix_sharing, reference.max_tokens_per_batch = self.prefix_sharing, self.max_tokens_per_batch

    # --- inference ---------------------------------------------------------------------------------------------------

    def predict(  # type: ignore[override]
        self,
        observation: Observation,
        state: StepState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, StepState | None]:
        """Return the next token for an observation or a batch of them, and the state (the KV cache) for the next call.

        See `LanguagePolicy.predict`; tokens are sampled at the agent's temperature.
        """
        return self.policy.predict(
            observation,
            state,
            episode_start,
            deterministic,
            action_masks=action_masks,
            temperature=self.temperature,
            generator=self._generator,
        )

    @collective
    def generate(
        self,
        prompts: Sequence[Any],
        deterministic: bool = False,
        max_new_tokens: int | None = None,
        *,
        n: int = 1,
        temperature: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Any:
        """Generate response texts for prompts, given as text or as chats.

        Prompts become token ids as in training: with the env's chat template and its arguments, or without an env the
        tokenizer's own.

        Args:
            prompts: a list of str, of chats (lists of messages), or of rows as an env takes them (dicts with `prompt`, and
                perhaps `tools` and `chat_template_kwargs`).
            deterministic: greedy decoding; otherwise sampled.
            max_new_tokens: limit of a response, in tokens; the env's by default, 64 without an env.
            n: responses to each prompt.
            temperature: divides the logits; the agent's by default.
            stop: stop strings; the env's by default. End tokens are the env's, or the model's without an env.

        Returns:
            A list of str, one for each prompt; with `n` above 1 a list of lists of str.

        Raises:
            TypeError: If the prompts are no such list.
            ValueError: If a prompt is no valid text, has no tokens, or is too long for the model; the message names it.
        """
        check_counts(max_new_tokens=max_new_tokens, n=n)
        if isinstance(prompts, str):
            raise TypeError(f"prompts is a str; give a list, [{prompts!r}]")
        if not isinstance(prompts, (list, tuple, np.ndarray)):
            raise TypeError(f"prompts is a {type(prompts).__name__}; give a list of str or of chats")
        if not len(prompts):
            return []
        rules = rules_of_vec_env(self.env) if self.env is not None else None
        tokenizer = self.policy.tokenizer if rules is None else rules.tokenizer
        if tokenizer is None:
            raise ValueError("the policy has no tokenizer: pass policy_kwargs={'tokenizer': ...}, or give the agent an env")
        contexts = encode_prompts(prompts, self.policy.prompt_format() if rules is None else rules.prompts.format, rules)
        limit = max_new_tokens or (rules.max_new_tokens if rules is not None else 64)
        check_tokens(contexts, limit, self.policy.vocab_size, self.policy.max_positions)
        stops = rules.stop_strings if rules is not None else None
        if stop is not None:
            stops = StopStrings(stop, tokenizer, special_tokens(tokenizer), self.policy.eos_ids)
        responses, _ = self.policy.sample(
            contexts,
            n,
            limit,
            self.temperature if temperature is None else temperature,
            deterministic=deterministic,
            generator=self._generator,
            completes_stop=stops.completed_by if stops else None,
        )
        if rules is not None:
            texts = rules.decode(responses)
        else:
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return texts if n == 1 else [texts[i : i + n] for i in range(0, len(texts), n)]

    @collective
    def chat(self, messages: Sequence[dict[str, Any]], deterministic: bool = False) -> list[dict[str, Any]]:
        """Answer messages, in the same context as in training: with the env's chat template, tools and limits.

        With `tools=`, calls are made and their results shown until a turn makes no call, or after `max_turns`. In an env with
        several turns, earlier answers of this agent stay in the context as they were sampled; other messages of the assistant
        are tokenized. With prompts of one turn the whole conversation is rendered by the chat template.

        Args:
            messages: the conversation, which ends with a message that is to be answered. To go on, append what is returned and
                the next user message.
            deterministic: greedy decoding; otherwise sampled.

        Returns:
            The new messages. The last one is of the assistant; of a tool, if `max_turns` or the model's length was reached.

        Raises:
            TypeError: If the messages are no list of messages.
            ValueError: If they end with the assistant, have no chat template, or are too long for the model.

        Examples:
            >>> agent.chat([{"role": "user", "content": "What is 1234 * 5678?"}])  # doctest: +SKIP
            [{'role': 'assistant', 'content': '', 'tool_calls': [...]}, {'role': 'tool', ...}, {'role': 'assistant', ...}]
        """
        conversation = check_messages(messages)
        if self.env is not None and (rules := rules_of_vec_env(self.env)).has_replies:
            return self._conversations.answer(self.policy, rules, conversation, self.sampler(deterministic))
        (text,) = self.generate([conversation], deterministic)
        return [{"role": "assistant", "content": text}]

    @collective
    def evaluate(
        self,
        env: Any,
        deterministic: bool = True,
        batch_size: int = 256,
        *,
        n_prompts: int | None = None,
        repeats: int = 1,
    ) -> dict[str, float]:
        """Run one episode, or several, for every prompt of an env.

        Args:
            env: a text env or its id, for instance `gym.make("llm_env/Addition-v0", split="test")`.
            deterministic: greedy decoding.
            batch_size: episodes at a time.
            n_prompts: number of prompts (seeds of a text env), from the first on. All by default, and 256 if there is no end of
                them (`num_tasks=None`).
            repeats: episodes per prompt. More than 1 make sense if sampled, or with a text env that is random.

        Returns:
            Means over the prompts: `reward` (the return), `length` in action tokens, `success_rate` where the env defines
            success, `turns` with a text env, and `reward/<name>` for every component. With `repeats` above 1 also
            `reward_stderr` and `success_rate_stderr`, standard errors of the means over prompts.

        Raises:
            ValueError: If the env's tokens or lengths do not fit the model.
        """
        check_counts(batch_size=batch_size, n_prompts=n_prompts, repeats=repeats)
        vec_env = as_vec_env(env, 1)
        rules = rules_of_vec_env(vec_env)
        check_tokenizers(self.policy, rules)
        check_positions(self.policy, rules)
        agree_on_ends(self.policy, vec_env)
        rules.record_apart(self.communicator.rank)
        if isinstance(rules.reference, BaseReference) and not rules.reference.has_model and self.policy.adapter is not None:
            rules.reference.set_model(self.policy.base, full_params_context(self.policy))
        return evaluate(self.policy, vec_env, self.sampler(deterministic), batch_size, self.communicator, n_prompts, repeats)

    def audit(self, *, n: int = 64, seed: int = 0, quiet: bool = False) -> Report:
        """Measure on fresh episodes whether sampling and training fit together; see `agents.check_agent`."""
        from agents.diagnostics import check_agent

        return check_agent(self, n=n, seed=seed, quiet=quiet)

    def play(
        self, env: Any = None, seed: int | None = None, deterministic: bool = False, *, sampling_seed: int = 0
    ) -> Playback:
        """Play one episode and return its transcript; training is not affected.

        For GRPO a group of `group_size` episodes is played, and the first is returned: advantages are relative to the group.

        Args:
            env: a text env or its id; the agent's by default.
            seed: the seed of the text env's episode; without a text env the index of the prompt. The first by default.
            deterministic: greedy decoding.
            sampling_seed: seeds the sampling of tokens.

        Returns:
            A `Playback`: `print` it for the transcript, and `table()` lists every token with mask, turn, reward, log-probs and
            advantage.

        Raises:
            ValueError: If the env has no episode with this seed.

        Examples:
            >>> import llm_env
            >>> from agents import GRPO
            >>> playback = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", n_envs=16).play(seed=3)
            >>> playback.rows[0]["action"], playback.rows[0]["turn"]
            (True, 1)
        """
        from agents.diagnostics import play

        return play(self, env, seed, deterministic, sampling_seed)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _excluded_save_params(self) -> list[str]:
        engine = ["_engine_setting"] if self._engine_is_object else []
        return [*super()._excluded_save_params(), *LIVE, *engine]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def _training_state(self) -> dict[str, Any]:
        """Return the state that a checkpoint gets: that of the last rollout's end, while the next is being collected."""
        if self._state.began is not None:
            return self._state.began
        return self._state.snapshot() | ({} if self._prefetched is None else self._prefetched.began)

    @collective
    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """Write the agent to one zip file: weights, optimizer, counts and random states, but not the env.

        Of a policy with an adapter, the weights are the adapter's and the critic's; the base is known by its path and a hash.
        The file also has the names of the trained parameters, the class of the model, and the algorithm. Of a model that
        transformers does not rebuild from its config (a class of your own, `trust_remote_code`, images and text, replaced
        modules) `save` warns that `load` will need `policy=<model>`.

        A file is first written beside its name and renamed once it is complete and on the disk, so that a run that is killed
        here leaves the old one. A callback that saves in the middle of a rollout saves the agent as it was at the rollout's
        beginning; whoever resumes from there collects it again, token for token.

        All of several processes call it, and the main one writes the file, which is the same for any number of processes.
        """
        check_optimizer(self.policy)
        self._checkpoint_format = FORMAT
        self._name_algorithm()
        self._policy_data = self.policy._get_constructor_parameters()
        self._saved_state = self._training_state()
        try:
            if not isinstance(path, (str, Path)):
                return super().save(path, exclude, include)
            if not self.communicator.is_main_process:
                if self.communicator.sharded:
                    self.get_parameters()  # the main process needs this one's shards
                return None
            target = Path(path)
            if target.suffix == "":
                target = target.with_name(f"{target.name}.zip")
            with atomic_write(target) as file:
                super().save(file, exclude, include)
        finally:
            self._policy_data, self._saved_state = {}, {}

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """Return the weights as SB3 saves them, and those of a reference that has moved since the env was made."""
        if self.communicator.sharded:
            self.communicator.all_gather_object(None, "weights")
        weights = self._reference_weights  # of an agent that was loaded and has no env yet
        if self._reference_sync.has_moved and self.env is not None:
            reference = self.rules.reference
            weights = None if reference is None else full_state_dict(reference.model.state_dict())
        return full_state_dict(super().get_parameters()) | ({} if weights is None else {"reference": weights})

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto") -> None:
        """Load weights from a dict, as `get_parameters` returns it, or from a checkpoint of this algorithm.

        Raises:
            ValueError: If the checkpoint is damaged or was saved by another algorithm.
        """
        params = load_path_or_dict
        if not isinstance(params, dict):
            self._check_file(params)
            _, params, _ = load_from_zip_file(params, device=device, load_data=False)
        self._reference_weights = params.get("reference")
        weights = {key: params[key] for key in params if key != "reference"}
        if is_sharded(self.policy):
            weights["policy"] = shard_state_dict(weights["policy"], self.policy.state_dict())
            if "policy.optimizer" in weights:
                weights["policy.optimizer"] = shard_optim_state_dict(self.policy.optimizer, weights["policy.optimizer"])
        super().set_parameters(weights, exact_match, device)
        keep_steps_on_cpu(self.policy.optimizer)
        if self.env is not None:
            self._restore_reference(self.rules)

    @classmethod
    def _check_file(cls, path: Any) -> None:
        """Check that a path or file object is a complete checkpoint of this algorithm; raise a ValueError if not."""
        if isinstance(path, (str, Path)) and Path(path).is_dir():
            raise ValueError(
                f"{path} is a folder, as save_pretrained writes it; make an agent of it: {cls.__name__}({str(path)!r}, env)"
            )
        verify_archive(path)
        check_algorithm(path, cls)

    def _restore_reference(self, rules: Rules) -> None:
        """Load the reference's weights from a checkpoint into the env's reference, if there are any."""
        weights, self._reference_weights = self._reference_weights, None
        if weights is None:
            return
        if rules.reference is None:
            raise ValueError(
                "the saved agent's reference had moved and its weights are in the file, but the env has no reference; make it "
                "with reference=<the model that training began with>"
            )
        try:
            rules.reference.model.load_state_dict(shard_state_dict(weights, rules.reference.model.state_dict()))
        except RuntimeError as error:
            raise ValueError(
                f"the saved reference's weights do not fit the env's {type(rules.reference.model).__name__} "
                f"({str(error).splitlines()[-1].strip()}); make the env with the reference that training began with"
            ) from error

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfAgent],
        path: Any,
        env: Any = None,
        device: torch.device | str = "auto",
        *,
        policy: Any = None,
        **kwargs: Any,
    ) -> SelfAgent:
        """Read an agent that `save` wrote, to use it or to resume training.

        Training resumes bit for bit (on CPU, with the same libraries and threads) as if it had never stopped, with the same
        env and `learn(..., reset_num_timesteps=False)`. The state of wrappers, of reward functions and of callbacks is not in
        the file.

        Args:
            path: the zip file.
            env: the env to resume with; its order of prompts continues if it has as many prompts and rows.
            device: where to put it.
            policy: the model to load the weights into, a path, a hub id or a `PreTrainedModel`: one of the saved class and
                config, where these do not come back from the file (see `save`), or the base of a saved adapter, where it was a
                model object or is not where it was. The weights of a whole model come from the file; those of an adapter's base
                are checked to be the right ones.
            kwargs: SB3's `custom_objects`, `print_system_info`, and attributes to replace, such as `n_envs`, the episodes in a
                rollout, of which `group_size` must be a divisor.

        Raises:
            FileNotFoundError: If there is no such file.
            TypeError: If `policy` is no causal language model.
            ValueError: If the file was cut off or damaged, another algorithm wrote it, its model cannot be rebuilt, `policy` is
                another one, or an adapter's base is not there or has other weights.
        """
        with get_communicator().section("load"):
            get_communicator().all_gather_object(None)  # the main process has finished the file
        cls._check_file(path)
        if isinstance(policy, LanguagePolicy):
            raise TypeError("policy is a LanguagePolicy; give the model, such as LanguagePolicy.lm, or its path")
        if policy is not None and not isinstance(policy, (str, Path, nn.Module)):
            raise TypeError(f"the model given to load is a {type(policy).__name__}; give a model, its path or its hub id")
        replaced: dict[str, Any] = {} if policy is None else {"_model": policy}
        if "engine" in kwargs:
            replaced["_engine_setting"] = kwargs.pop("engine")
        if "n_envs" in kwargs:
            replaced["_n_envs_setting"] = replaced["n_envs"] = check_int("n_envs", kwargs.pop("n_envs"), 1)
        agent = super().load(path, None, device, **kwargs, **replaced)
        agent.policy.check_fingerprint(agent._policy_data)
        agent._policy_data = {}
        if env is not None:
            agent.set_env(env)
        return agent


def _keywords_of(kind: type[LanguageAgent]) -> set[str] | None:
    """Return the names of a class's keyword arguments; None if it takes any, and does with them what it likes."""
    names = set(CommonArguments.__annotations__)
    for parent in kind.__mro__:
        if "__init__" in vars(parent):
            parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
            rest = [each for each in parameters if each.kind is each.VAR_KEYWORD]
            names |= {each.name for each in parameters if each not in rest} - {"self"}
            if not rest:
                return names
            if CommonArguments.__name__ not in str(rest[0].annotation):
                return None
    return names


def _parameters_of(kind: type) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(kind.__init__).parameters.values() if p.default is not p.empty]  # type: ignore[misc]


def _differs(value: Any, default: Any) -> bool:
    if isinstance(value, FloatSchedule):
        value = getattr(value.value_schedule, "val", value)
    return value is not default and not (type(value) in (bool, int, float, str) and value == default)


def _short(value: Any) -> str:
    if isinstance(value, FloatSchedule):
        value = getattr(value.value_schedule, "val", value.value_schedule)
    return f"{value:.3g}" if isinstance(value, float) else repr(value)[:60]
