"""What launch/plan.py prints, draws and checks."""
