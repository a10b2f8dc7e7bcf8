"""One module per stage with `run(context) -> StageResult`; `contract` says what that means."""
