"""Verbs other than the trainer's: one file each, with `add_arguments(parser)` and `run(arguments)`."""

from __future__ import annotations

COMMANDS = {
    "plan": "show what a pre-training run would need: memory, time, money, text",
    "inspect": "show the data of a configuration as the model will see it, before anything is trained",
    "prepare": "make the token shards of a configuration's data, so fit starts at once",
    "tokenizer": "train a tokenizer on your own texts",
    "generate": "continue a prompt with a trained model",
    "chat": "talk with a trained model in the terminal",
    "report": "write an HTML page about a run, or about several runs side by side",
    "export": "write a trained model for other programs",
    "configs": "list the configurations that come with the package, or copy one for editing",
    "requeue": "in a SLURM job: put the job of a failed run back into the queue (docs/cluster.md)",
    "study": "run a controlled experiment: variants and seeds of one configuration, and a verdict",
}
"""Verb → what it does. A verb's module has the verb's name."""
