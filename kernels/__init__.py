"""Between the method and the machine: the choice of kernel, its arguments, and where pages wait."""
