"""New things at the joints of the program, each in one file: a layout, a method, an encoding, a step, a kernel."""
