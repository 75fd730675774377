"""Many interventions at the cost of a few forwards."""
