"""Callbacks for trainers. Each module needs its framework; this package needs none."""
