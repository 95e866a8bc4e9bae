"""Many experts trained on one frozen base in one step, each as if it were trained alone."""
