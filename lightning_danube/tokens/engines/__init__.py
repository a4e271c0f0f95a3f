"""Engines that prepare token shards: the own engine, which is `preparation`, and datatrove."""

from typing import Literal, get_args

Engine = Literal["own", "datatrove"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Executor = Literal["local", "slurm", "ray"]
EXECUTORS: tuple[Executor, ...] = get_args(Executor)
