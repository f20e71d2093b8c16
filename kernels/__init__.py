"""Between the method and the machine: which kernel runs, what it is given, where pages wait."""
