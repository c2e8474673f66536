"""`Trainer`, sharing heads as this library does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..errors import LayerFusionError
from ..hub.push import check_shareable
from ..recipes import find_recipe
from .metrics import without_timings


class LayerFusionTrainer(Trainer):
    """`transformers.Trainer` whose pushes hold the head, its processor, card and training record, and nothing else.

    `Trainer` by itself uploads its whole output folder, pickled training arguments among it, under a card of its own.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Pushes while training goes on would be of the whole output folder.
        self.args.hub_strategy = HubStrategy.END

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the head; what was measured of it before holds no longer.

        Raises:
            LayerFusionError: if its recipe is one in closed form, which steps would only approach.
        """
        recipe = self._head().config.recipe
        if find_recipe(recipe).solver == "ridge":
            raise LayerFusionError(
                f"recipe {recipe!r} is solved in closed form, not in steps: use sweep(features, recipe={recipe!r}), or "
                "layerfusion train"
            )
        self._head().training_summary = {}
        return super().train(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository; a head that others could not load is refused here, before hours are spent."""
        check_shareable(self._head().config)
        super().init_hf_repo(*args, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Save the head to `output_dir` and upload it in one commit.

        Args:
            commit_message: title of the commit.
            blocking: kept for the sake of `Trainer`'s signature; a head is small, and always waited for.
            token: by default `hub_token`.
            revision: branch, by default `hub_revision`.
            private: of a new repository, by default `hub_private_repo`.
            kwargs: for [`ViTForAttentiveLayerFusionClassification.push_to_hub`].

        Returns:
            The address of the commit; `None` in processes other than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return self._head().push_to_hub(
            self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).name,
            commit_message=commit_message or "End of training",
            token=token if token is not None else self.args.hub_token,
            revision=revision if revision is not None else self.args.hub_revision,
            private=private if private is not None else self.args.hub_private_repo,
            **kwargs,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the head, with what the last evaluation found in its card unless a fuller record is there."""
        head, measured = self._head(), self._last_evaluation()
        if measured and "metrics" not in head.training_summary:
            head.training_summary = {**head.training_summary, "metrics": measured}
        super().save_model(output_dir, _internal_call)

    def _head(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _last_evaluation(self) -> dict[str, float]:
        """Metrics of the last evaluation, by name, without its loss and timings."""
        logged = next((entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), {})
        return {name: value for name, value in without_timings(logged).items() if not name.endswith("loss")}
