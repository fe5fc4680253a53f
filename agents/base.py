"""What all agents share: from collecting a rollout to the optimizer step, on SB3's `BaseAlgorithm`."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from torch import Tensor
from transformers import PreTrainedModel

from agents.checks import check_computation, check_counts, check_groups, check_numbers, check_optimizer, sort_out
from agents.distributed import placed, world
from agents.losses import token_weights
from agents.optimizers import class_of
from agents.overlap import Ahead, check_overlap
from agents.policy import Evaluation, LanguagePolicy
from agents.preflight import preflight
from agents.progress import call_back, feed_kl_controllers, tokens_to_go, watch_together
from agents.records import record_rollout, record_time
from agents.rollout import Rollout, clock_of, collect, collect_by_tokens
from agents.sampler import Sampler
from agents.setup import SetUp
from agents.update import update
from agents.vec_env import DEFAULT_N_ENVS, as_vec_env
from llm_env.arguments import whole
from llm_env.lm.sharing import PrefixSharing
from llm_env.rewards import TrainerState
from llm_env.rules import Rules

SelfAgent = TypeVar("SelfAgent", bound="LanguageAgent")
LossTerms = dict[str, tuple[float, Tensor]]
DEFAULT_TIMESTEPS = 100_000
DEFAULT_GROUP_SIZE = 8
DEFAULT_CAP = 2.0  # of importance weights, where another engine or older weights draw
NOT_SAVED = ("tokenizer", "peft_config")  # of `policy_kwargs`: the policy knows them


class LanguageAgent(SetUp):
    """Trains a causal language model on a text env; the algorithms fill in `compute_advantages` and `loss`.

    One timestep is one action token. A rollout is `n_envs` episodes; `n_epochs` passes over it are cut into minibatches of
    `batch_size` episodes, one optimizer step each.

    Args:
        policy: a path, a hub id, a `PreTrainedModel` or a `LanguagePolicy`; or a LoRA adapter's folder, to train it on. Of a
            model object, parameters with `requires_grad=False` stay as they are; a quantized model needs an adapter.
        env: a text env, its id, or an SB3 VecEnv over text envs; may be given to `learn` instead.
        learning_rate: a number or an SB3 schedule. None takes 3e-4 for a model of a million parameters, 1e-6 for one of a
            billion, and a power law between them, divided by `n_epochs`: passes over the same episodes add up; ten times that
            for an adapter.
        n_envs: episodes in a rollout; 64, or the rows of a vector env, by default.
        n_epochs: passes over a rollout.
        batch_size: episodes in an optimizer step, whole groups where they fit in evenly; the whole rollout by default.
        micro_batch_size: episodes in a forward pass; bounds the memory and changes nothing else. `batch_size` by default.
        max_tokens_per_batch: positions in a forward pass: prompts, each counted as often as it is computed, responses and
            padding; another bound of the kind. By default 2048 (or one group) on a CPU, where more is
            slower, and none elsewhere.
        preflight: try before the first rollout whether the longest pass fits into memory; see `agents.preflight.preflight`.
        max_grad_norm: the gradient is scaled down to this norm.
        temperature: divides the logits, in sampling and in training.
        top_k, top_p, min_p: restrict the sampling (off by default); the training is then off-policy, and says so.
        max_num_seqs: responses under way at a time while sampling, at least a group: bounds the memory. All by default.
        prefix_sharing: compute a prompt once for all answers to it: "auto" where the model can and it is less work, True or
            False; see `llm_env.lm.sharing`.
        bf16: matrix products in bfloat16, under autocast; weights, log-probs and losses stay float32.
        overlap: draw the next rollout while the last one is learned from; see `agents.overlap`.
        importance_cap: weigh a token's advantage by min(pi/pi_sampled, importance_cap), pi by the training path before the
            update: corrects for what lies between that and what drew the token; see `agents.losses.truncated_importance`. By
            default 2 where another engine or older weights draw, else off.
        gradient_checkpointing: keep nothing of the model's layers but their inputs for the backward pass, which computes them
            again: less memory, more time, the same gradient. Sampling is as fast as without.
        optimizer: `"adamw_torch"`, or `"adamw_8bit"`, whose two moments take a byte a weight each (needs bitsandbytes); another
            one is given by `policy_kwargs`.
        offload_optimizer: keep the optimizer's state on the CPU but for that of the parameter that is stepped; changes nothing
            but memory and time.
        offload_reference: keep the reference's weights on the CPU but while it is asked, likewise.
        engine: what draws the responses in training: None for the policy itself, `"vllm"`, or an `agents.engines.Engine`.
            Evaluation, `predict` and `generate` stay with the policy.
        engine_kwargs: arguments of `agents.vllm_engine.VLLMEngine`, for instance `base_url`.
        aggregation: how token losses become one number; see `agents.losses.token_weights`.
        mask_truncated: leave responses that the length limit cut off out of the loss; their rewards count as before.
        stats_window_size: episodes over which `rollout/` means are taken; those of the last rollout by default.
        tensorboard_log: folder for TensorBoard.
        policy_kwargs: `tokenizer` (for a model object), `optimizer_class` and `optimizer_kwargs`; `peft_config` trains a LoRA
            adapter and a value head in the place of all weights, see `agents.policy.LanguagePolicy`.
        verbose: 0 silent, 1 a table of the logs after every rollout.
        seed: seeds sampling, minibatches and the order of the prompts.
        device: "auto" takes CUDA where there is some.

    Raises:
        ValueError, TypeError: an argument is unusable, or env and model do not fit; the message says what to change.
    """

    needs_old_logp = True

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
        overlap: bool = False,
        importance_cap: float | None = None,
        gradient_checkpointing: bool = False,
        optimizer: str = "adamw_torch",
        offload_optimizer: bool = False,
        offload_reference: bool = False,
        engine: Any = None,
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
        if seed is not None:
            seed = whole("seed", seed, 0, 2**32 - 1)  # what numpy's global generator takes, which SB3 seeds too
        if not isinstance(policy_kwargs or {}, dict):
            raise TypeError(f"policy_kwargs={policy_kwargs!r} must be a dict")
        self.world = world()
        super().__init__(
            policy=LanguagePolicy,
            env=None,
            learning_rate=0.0 if learning_rate is None else learning_rate,
            policy_kwargs={key: value for key, value in (policy_kwargs or {}).items() if key not in NOT_SAVED},
            stats_window_size=stats_window_size or DEFAULT_N_ENVS,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=self.world.device if device == "auto" and self.world.device is not None else device,
            support_multi_env=True,
            seed=self.world.seed(seed),
        )
        check_counts(n_envs=n_envs, n_epochs=n_epochs, batch_size=batch_size, stats_window_size=stats_window_size)
        check_counts(micro_batch_size=micro_batch_size, max_tokens_per_batch=max_tokens_per_batch, max_num_seqs=max_num_seqs)
        switches = {"preflight": preflight, "overlap": overlap, "bf16": bf16, "gradient_checkpointing": gradient_checkpointing}
        switches |= {"offload_optimizer": offload_optimizer, "offload_reference": offload_reference}
        check_computation(prefix_sharing, max_num_seqs, self.group_size, **switches)
        class_of(optimizer)  # refuses an unknown one
        check_numbers(0.0, max_grad_norm=max_grad_norm)
        check_numbers(1.0, importance_cap=importance_cap)
        token_weights(torch.ones(1, 1), aggregation)  # refuses an unknown one
        Sampler(temperature, top_k, top_p, min_p=min_p)
        if n_envs is not None:
            check_groups(self.group_size, n_envs)
        self._model = policy
        self._tokenizer, self._peft_config = ((policy_kwargs or {}).get(name) for name in NOT_SAVED)
        self._wanted_n_envs = n_envs
        self._wanted_learning_rate = learning_rate
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
        self.bf16 = bf16 or self.world.bf16
        self.overlap = overlap
        self.importance_cap = importance_cap
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer = optimizer
        self.offload_optimizer = offload_optimizer
        self.offload_reference = offload_reference
        self.set_engine(engine, engine_kwargs)
        self.aggregation = aggregation
        self.mask_truncated = mask_truncated
        self._window_is_rollout = stats_window_size is None
        self._policy_data: dict[str, Any] = {}
        self._position: dict[str, Any] = {}
        self._began: dict[str, Any] | None = None
        self._reference_moved = False
        self._reference_weights: dict[str, Any] | None = None
        self._tokens_left_over = 0
        self._has_had_env = False
        self._algorithm = type(self).__name__
        self._algorithms = [parent.__name__ for parent in type(self).__mro__]
        if _init_setup_model:
            self._setup_model()
            if env is not None:
                self._attach(as_vec_env(env, self.n_envs))

    # --- learning ----------------------------------------------------------------------------------------------------

    @placed
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
        stop, or that an error or Ctrl-C cuts short, is neither trained on nor counted.

        Going on (`reset_num_timesteps=False`), in this process or from a file, gives the weights of a run that was never
        stopped: what one call overshot counts towards the next, so that twice k tokens are 2k. A schedule runs over all
        tokens asked for so far: it is at its end after k, so that only a run of 2k that is stopped at n and goes on for
        2k - n equals the whole one. SB3's callbacks count `on_step` from when they were made, and `iteration` from the call.

        Args:
            env_or_timesteps: an env to train on, as in `learn(env)`, or `total_timesteps`, as in SB3.
            callback: SB3 callbacks; or a number, `total_timesteps`, as in `learn(env, 10_000)`.
            log_interval: rollouts between two dumps of the logs; None for none.
            tb_log_name: name of the run for TensorBoard; the algorithm's by default.
            reset_num_timesteps: count from 0 and begin a new TensorBoard run; False goes on, in the latest run of that name.
            progress_bar: show one (needs rich and tqdm).
            total_timesteps: number of action tokens; 100,000 by default.
            env: an env to train on.
        """
        check_counts(log_interval=log_interval)
        env, callback, total_timesteps = sort_out(env_or_timesteps, callback, total_timesteps, env)
        if env is not None:
            self._attach(as_vec_env(env, self.n_envs))
        self._hand_down()
        check_overlap(self)
        check_optimizer(self.policy)
        preflight(self)
        asked = DEFAULT_TIMESTEPS if total_timesteps is None else total_timesteps
        total_timesteps, callback = self._setup_learn(
            tokens_to_go(self, asked, reset_num_timesteps),
            callback,
            reset_num_timesteps,
            tb_log_name or type(self).__name__,
            progress_bar and self.world.main,
        )
        watch_together(self, callback)
        callback.on_training_start(locals(), globals())
        iteration = 0
        try:
            while self.num_timesteps < total_timesteps:
                # Before collecting: a rollout ends past the total, where a schedule would be 0 or less.
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                rollout = self.collect(callback)
                if rollout is None:
                    break
                self.train(rollout)
                iteration += 1
                if log_interval is not None and (self.num_timesteps >= total_timesteps or iteration % log_interval == 0):
                    self.dump_logs(iteration)
        except BaseException:  # Ctrl-C too: what was logged so far is written before it goes on its way
            self.logger.dump(self.num_timesteps)
            raise
        finally:
            self.call_off()
            callback.on_training_end()
        return self

    def collect(self, callback: BaseCallback) -> Rollout | None:
        """One rollout, with the callbacks called for its tokens; None, and nothing has moved, where one asked to stop."""
        assert self.env is not None
        callback.on_rollout_start()
        self._fall_in_step()
        self._tell_rewards_how_far()
        with self.rollout_under_way():
            rollout = self.sample_rollout()
            feed_kl_controllers((self.rules.kl, self.kl_coef), rollout)
            if not call_back(self, callback, rollout):
                self.stop_rollout()
                return None
            callback.on_rollout_end()
            record_rollout(self, rollout)
            if self.overlap and self.num_timesteps < self._total_timesteps:
                self._ahead = Ahead(self)
        return rollout

    def _tell_rewards_how_far(self) -> None:
        """Keep what reward functions may ask for as `trainer_state`."""
        done, steps = min(1.0, self.num_timesteps / max(1, self._total_timesteps)), self._n_updates
        planned = round(steps / done) if done else 1
        self.rules.rewards.trainer_state = TrainerState(steps, max(1, steps, planned), done, 1, self.num_timesteps)

    def sample_rollout(self) -> Rollout:
        """`n_envs` episodes, on the response clock where the env allows it; with `overlap`, those that are under way."""
        assert self.env is not None
        venv, ahead, self._ahead = clock_of(self.env), self._ahead, None
        if ahead is not None:
            return ahead.rollout()
        if venv is not None:
            return collect(self.policy, venv, self.group_size, self.sampler(), {}, self.world, self.responder())
        indexes = np.repeat([self._cursor.next() for _ in range(self.n_envs // self.group_size)], self.group_size)
        return collect_by_tokens(self.policy, self.env, indexes.tolist(), self.group_size, self.sampler(), self.world)

    def train(self, rollout: Rollout) -> None:
        """The update: see `agents.update`."""
        self._update_learning_rate(self.policy.optimizer)
        rows = self.training_rows(rollout)
        update(self, rollout if rows is None else rollout.take(rows))

    def dump_logs(self, iteration: int = 0) -> None:
        """Write what has been recorded to the logger's outputs."""
        record_time(self, iteration)
        self.logger.dump(self.num_timesteps)

    @property
    def importance(self) -> float | None:
        """The cap of the importance weights; None where there are none."""
        needed = self.overlap or self.engine is not None
        return DEFAULT_CAP if self.importance_cap is None and needed else self.importance_cap

    # --- what an algorithm fills in ----------------------------------------------------------------------------------

    def check_rules(self, rules: Rules) -> None:
        """Refuse an env that cannot serve the algorithm's arguments, with a ValueError."""

    def training_rows(self, rollout: Rollout) -> list[int] | None:
        """Which of the sampled episodes are trained on; None for all."""
        return None

    def compute_advantages(self, rollout: Rollout) -> None:
        """Set `rollout.advantages` (and `rollout.returns` where there is a value head)."""
        raise NotImplementedError

    def loss(self, batch: Rollout, result: Evaluation, weights: Tensor) -> tuple[LossTerms, dict[str, Tensor]]:
        """The loss of one micro-batch.

        Args:
            batch: some episodes of the rollout.
            result: what the training path says of them now.
            weights: (B, T), the tokens' weights in the loss of the whole optimizer step.

        Returns:
            The terms of the loss by name, each a coefficient and a weighted sum over tokens; and statistics by name, means
            over the action tokens.
        """
        raise NotImplementedError

    def stops_early(self, statistics: dict[str, float]) -> bool:
        """Whether the policy has moved far enough for this rollout."""
        return False
