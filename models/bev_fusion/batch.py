"""The batch keys of bird's-eye-view fusion."""

VIEW_GRID = "view_grid"  # (B, Z, rows, cols, 2) where bird's-eye cells appear in IMAGE, normalised
VIEW_VALID = "view_valid"  # (B, Z, rows, cols) bool: whether they do
TRACES = "traces"  # (B, P, N) float32 ultrasonic envelopes in [0, 1]
CELSIUS = "celsius"  # (B,) float32 air temperature
CALIBRATIONS = "calibrations"  # datamodules.driving.Calibrations of the B samples
BEV_LABEL = "bev_label"  # (B, rows, cols) int64 class of each bird's-eye cell, 255 unknown
CONDITION = "condition"  # list of B str: day, dusk, night or glare
