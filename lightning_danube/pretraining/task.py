"""Pre-training as a Lightning system around the plain decoder: the loss and the length of the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_danube.checkpoints.strategy import ShardedStrategy
from lightning_danube.device import check_memory
from lightning_danube.model import Decoder, DecoderShape
from lightning_danube.model.compilation import check_compiler, missing_for_gpu_code
from lightning_danube.model.config import ActivationCheckpointing
from lightning_danube.options import parse_tokens
from lightning_danube.pretraining.float8 import check_float8, multiply_in_float8
from lightning_danube.pretraining.settings import PretrainingSettings
from lightning_danube.terminal import tell
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.training.contract import TokenBatch
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.training.task import DecoderTask
from lightning_danube.weights.loading import load_decoder
from lightning_danube.weights.lora import Lora
from lightning_danube.weights.new_tokens import train_rows


class Pretraining(DecoderTask):
    """Next-token prediction with the Danube decoder, from random weights or from trained ones.

    Args:
        learning_rate: schedule in tokens.
        decoder: the shape, or the name of a preset ("danube3-500m", "danube3-4b"). Vocabulary and context length come
            from the data. Not needed with `weights`.
        weights: the model to continue: a run, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or
            "smollm2". Its tokenizer has to be the data's; tokens that the data add get the mean of the embeddings of
            their pieces.
        lora: train an adapter on the frozen weights, instead of all weights. The embeddings of new tokens train, too.
        optimizer: settings of AdamW, or of Muon by its class path.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations;
            "selective" keeps the results of the attention kernels and recomputes the rest.
        compile_blocks: compile each block with PyTorch for training and held-out losses. On a CPU this takes about 20 s
            at the start of a run, and needs a C++ compiler. None: `fit` compiles on a GPU if Triton and a C compiler
            are there, and does not compile on a CPU.
        float8: multiply the matrices of the blocks in FP8, with weights and all else as before. Needs a GPU that has
            FP8, and torchao (extra `float8`); without compiled blocks the casts cost more than the products gain.
        vocab_size, context_length, batch_tokens, total_tokens, tokenizer: linked from the data module.

    Raises:
        ValueError: the weights cannot be read, or the data do not fit them.
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        *,
        vocab_size: int,
        context_length: int,
        batch_tokens: int,
        total_tokens: int,
        tokenizer: DocumentTokenizer | None = PretrainingSettings.tokenizer,
        decoder: DecoderShape | str | None = PretrainingSettings.decoder,
        weights: str | None = PretrainingSettings.weights,
        lora: Lora | None = PretrainingSettings.lora,
        optimizer: AdamW = PretrainingSettings.optimizer,
        activation_checkpointing: ActivationCheckpointing = PretrainingSettings.activation_checkpointing,
        compile_blocks: bool | None = PretrainingSettings.compile_blocks,
        float8: bool = PretrainingSettings.float8,
    ) -> None:
        settings = PretrainingSettings(
            learning_rate,
            vocab_size=vocab_size,
            context_length=context_length,
            batch_tokens=batch_tokens,
            total_tokens=total_tokens,
            tokenizer=tokenizer,
            decoder=decoder,
            weights=weights,
            lora=lora,
            optimizer=optimizer,
            compile_blocks=compile_blocks,
            float8=float8,
        )
        continued = settings.continuation
        if continued is None:
            check_memory("model.decoder", settings.config.parameters * torch.float32.itemsize)
            model = Decoder(settings.config)
        else:
            assert weights is not None
            # Master weights in float32, as in fine-tuning: 16-bit weights would round small steps away.
            model = load_decoder(weights, dtype=torch.float32)
            continued.apply(model)
        super().__init__(model, settings.learning_rate, optimizer, weights=weights, lora=settings.lora)
        self.new_tokens = [] if continued is None else list(continued.pieces)
        if self.lora is not None and self.new_tokens:
            train_rows(self.decoder, self.new_tokens)
        self.batch_tokens, self.total_tokens = parse_tokens(batch_tokens), parse_tokens(total_tokens)
        self.decoder.activation_checkpointing = activation_checkpointing
        self.compile_blocks, self.float8 = compile_blocks, float8
        self._is_float8 = False

    def configure_model(self) -> None:
        """Chooses how the blocks multiply and whether they are compiled, then distributes the decoder.

        Raises:
            ValueError: the blocks are to be compiled on a CPU, and there is no C++ compiler; new tokens are to train
                beside an adapter on sharded weights; or see `check_float8`.
        """
        if self.lora is not None and self.new_tokens and isinstance(self.trainer.strategy, ShardedStrategy):
            raise ValueError(
                "data.new_tokens with model.lora train on one device or with ddp, not with sharded weights: set "
                "trainer.strategy to auto or ddp"
            )
        if self.float8 and not self._is_float8:
            tensor_parallel = 1 if self.device_mesh is None else self.device_mesh["tensor_parallel"].size()
            check_float8(self.config, self.trainer.precision, self.trainer.strategy.root_device, tensor_parallel)
            multiply_in_float8(self.decoder)
            self._is_float8 = True
        if not self.decoder.has_compiled_blocks and self._compiles_blocks():
            self.decoder.compile_blocks()
        super().configure_model()

    def _compiles_blocks(self) -> bool:
        device = self.trainer.strategy.root_device.type
        if self.compile_blocks and device == "cpu":
            check_compiler("model.compile_blocks", "set model.compile_blocks to false")
        chosen = self.compile_blocks is not None or self.lora is not None
        if chosen or device != "cuda" or self.trainer.state.fn != "fit":
            return bool(self.compile_blocks)
        missing = missing_for_gpu_code()
        if missing and self.trainer.is_global_zero:
            tell(f"blocks are not compiled, because there is no {missing}: training is slower")
        return not missing

    def length_in_tokens(self) -> tuple[int, int]:
        return self.batch_tokens, self.total_tokens

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        if self.has_dropout:
            self.seed_dropout(batch_idx)
        total, count = self.sum_of_losses(batch)
        loss = total / count
        self._losses.append(loss.detach())
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.lora is not None and self.new_tokens:
            checkpoint["new_token_ids"] = self.new_tokens
