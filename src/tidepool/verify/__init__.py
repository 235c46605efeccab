"""A small trained model, questions whose right answers need intact caches, and `tidepool verify`, which asks them.

`task` makes texts and questions, `scenarios` what to put memory through, `worker` runs one side in its own process,
`drive` runs the sides, `report` judges and prints. Only the worker imports vLLM.
"""
