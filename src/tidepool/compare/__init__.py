"""Stock vLLM and tidepool side by side: the same model, KV bytes and requests, through real vLLM.

`workloads` makes the requests, `worker` runs one side in its own process, `drive` lets the sides take turns, `report`
judges and prints. Only the worker imports vLLM.
"""
