"""The publishing Trainer, made to push: every commit on the Hub carries the guarantee and the log."""

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from hf_dpzo.card.upload import Destination, Snapshot
from hf_dpzo.distributed.sharding import refuse_sharded_push
from hf_dpzo.models.unwrap import unwrap_optimizer
from hf_dpzo.trainer.publishing import PublishingTrainer


logger = logging.getLogger(__name__)


class PushingTrainer(PublishingTrainer):
    """A publishing Trainer that pushes to the Hub: card, `privacy.json`, log and, where wanted, weights."""

    push_in_progress: PushInProgress | None = None  # As stock has it where it pushes.

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """As stock, in one commit: weights, or with `push_trajectory` none; card, `privacy.json` and log.

        Args:
            commit_message: of the commit.
            blocking: whether to wait for it.
            token: that may write.
            revision: the branch.
            private: whether a repository that is made is private.
            kwargs: what `create_model_card` takes.

        Raises:
            ValueError: nothing was trained.
        """
        if not self._is_trained:
            raise ValueError("push_to_hub: nothing was trained, so there is no guarantee to publish; call train().")
        refuse_sharded_push(unwrap_optimizer(self.optimizer).parameters())
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._save_weights()
        self.create_model_card(**kwargs)
        self._finish_current_push()
        snapshot = self._take_snapshot()
        to = Destination(repository=self.hub_model_id, revision=revision or self.args.hub_revision, token=token)
        return snapshot.upload(to, message=commit_message, wait=blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As stock; but what is pushed is saved anew, for other things may lie in the checkpoint's folder."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self._is_pushing and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        snapshot = self._take_snapshot()
        by_epoch = self.args.save_strategy == SaveStrategy.EPOCH
        when = f"epoch {int(self.state.epoch)}" if by_epoch else f"step {self.state.global_step}"
        to = Destination(repository=self.hub_model_id, revision=self.args.hub_revision)
        self._report_pushes()
        job = snapshot.upload(to, message=f"Training in progress, {when}", wait=False)
        jobs = self.push_in_progress.jobs if self._is_pushing else []
        self.push_in_progress = PushInProgress([*jobs, job])

    def _finish_current_push(self) -> None:
        """As stock; then say which pushes failed, which stock never looks at."""
        super()._finish_current_push()
        self._report_pushes()
        self.push_in_progress = None

    def _report_pushes(self) -> None:
        # Not where they happen: what is logged while private rows are evaluated is dropped.
        for job in [] if self.push_in_progress is None else self.push_in_progress.jobs:
            if job.done() and job.exception() is not None:
                logger.warning("A push to the Hub failed, and the next one will make up for it: %s", job.exception())

    def _take_snapshot(self) -> Snapshot:
        """What to push, in a folder that steps that follow do not change, and where nothing was before."""
        snapshot = Snapshot(Path(self.args.output_dir))
        if not self.args.push_trajectory:
            self.save_model(str(snapshot.folder), _internal_call=True)
        self._write_card(snapshot.folder, self._fingerprint())
        return snapshot

    @property
    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()
