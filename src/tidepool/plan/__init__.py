"""What fits, before anything is loaded: tokens, requests and waste, for stock vLLM and for tidepool.

`predict` works on the groups of `tidepool.cache` alone; `make_plan` answers everything about a model.
Importing this needs neither torch nor vLLM nor transformers.
"""

from tidepool.plan.account import Account, Requests, account, admit
from tidepool.plan.inputs import (
    GPU_MIB,
    Card,
    PlanError,
    find_card,
    parse_layer_dtypes,
    parse_lengths,
    parse_mix,
    parse_size,
)
from tidepool.plan.memory import ElasticMemory, FixedMemory, Kind, Memory, PlannedGroup, StockMemory
from tidepool.plan.planner import CapacityPlan, Column, DtypeRow, PlanOptions, make_plan
from tidepool.plan.predict import Partition, predict, predict_stages
from tidepool.plan.stock import StockLayout, stock_layout, stock_memory

__all__ = [
    "GPU_MIB",
    "Account",
    "CapacityPlan",
    "Card",
    "Column",
    "DtypeRow",
    "ElasticMemory",
    "FixedMemory",
    "Kind",
    "Memory",
    "Partition",
    "PlanError",
    "PlanOptions",
    "PlannedGroup",
    "Requests",
    "StockLayout",
    "StockMemory",
    "account",
    "admit",
    "find_card",
    "make_plan",
    "parse_layer_dtypes",
    "parse_lengths",
    "parse_mix",
    "parse_size",
    "predict",
    "predict_stages",
    "stock_layout",
    "stock_memory",
]
