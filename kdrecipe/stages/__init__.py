"""One file per stage of the stage table, and the plan that puts them together."""
