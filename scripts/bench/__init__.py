"""Speed of steps, layers and quantizers, and a roofline."""
