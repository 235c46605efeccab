"""What fits, before anything is loaded: tokens, requests and waste, for stock vLLM and for tidepool.

`make_plan` answers everything about a model.
Importing this needs neither torch nor vLLM nor transformers.
"""

from tidepool.plan.account import Account, Requests, account, admit
from tidepool.plan.inputs import Card, parse_layer_dtypes, parse_lengths, parse_mix
from tidepool.plan.planner import CapacityPlan, Column, DtypeRow, PlanOptions, make_plan
from tidepool.plan.stock import StockLayout, stock_layout, stock_memory

__all__ = [
    "Account",
    "CapacityPlan",
    "Card",
    "Column",
    "DtypeRow",
    "PlanOptions",
    "Requests",
    "StockLayout",
    "account",
    "admit",
    "make_plan",
    "parse_layer_dtypes",
    "parse_lengths",
    "parse_mix",
    "stock_layout",
    "stock_memory",
]
