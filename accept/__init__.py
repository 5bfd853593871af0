"""`make accept`: the first command on a real machine. Does it compute what the tests prove?"""
