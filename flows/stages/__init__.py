"""One module per stage, each with `run(context) -> StageResult`; `contract` says what that means."""
