"""Engines side by side, each in a process of its own, for `tidepool.compare`, `tidepool.verify` and `tidepool.replay`.

`environment` and `process` are the command's half, `child` and `engine` the half of the processes that run vLLM;
`agreement` says whether two sides' answers are the same.
"""
