// Included before everything: with csrc/portable.cpp, what is built on a newer Linux needs no more of it than
// glibc 2.28 and libstdc++ 3.4.24 (manylinux_2_28). tests/test_binary.py looks.
#pragma once
#if defined(__linux__) && defined(__x86_64__)
// The versions of 2.29 differ only in not setting errno as POSIX.1-1988 asks.
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
__asm__(".symver pow,pow@GLIBC_2.2.5");
__asm__(".symver expf,expf@GLIBC_2.2.5");
__asm__(".symver logf,logf@GLIBC_2.2.5");
__asm__(".symver powf,powf@GLIBC_2.2.5");
#endif
