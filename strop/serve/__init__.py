"""A fleet of serving instances: simulated, planned, routed. No tensor library is imported."""
