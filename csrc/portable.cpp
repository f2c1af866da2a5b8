// Symbols that the headers of newer compilers want of newer libraries, defined here (csrc/portable.h).
#include <exception>
#include <new>
#include <sstream>

#if defined(__linux__)
extern "C" {
char __libc_single_threaded = 0;  // glibc 2.32. 0: count references atomically, which is always right
}
#endif

#if defined(__GLIBCXX__) && __GNUC__ >= 11
namespace std {
[[noreturn]] void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}  // libstdc++ 3.4.29
}  // namespace std

template class std::basic_stringbuf<char>;  // default constructors: 3.4.26
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// CXXABI 1.3.13 lets headers count the references of an exception; older libraries do it where one is copied.
extern "C" {
void copy_exception(void* to, const void* from);
void drop_exception(void* one);
}
__asm__(".symver copy_exception,_ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
__asm__(".symver drop_exception,_ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");
namespace std {
namespace __exception_ptr {
void exception_ptr::_M_addref() noexcept {
  void* copy;  // never dropped: one reference more
  copy_exception(&copy, this);
}
void exception_ptr::_M_release() noexcept {
  drop_exception(this);
  *reinterpret_cast<void**>(this) = nullptr;
}
}  // namespace __exception_ptr
}  // namespace std
#endif
