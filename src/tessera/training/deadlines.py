"""stub"""
from statistics import median
class Deadline:
    def __init__(self, floor_s, cap_s): self.f,self.c,self.o=floor_s,cap_s,[]
    def observe(self,s): self.o=[*self.o[-63:],s]
    def next_s(self):
        if not self.o: return self.c
        m=median(self.o); mad=median(abs(x-m) for x in self.o)
        return min(self.c,max(self.f,m+3*mad))
