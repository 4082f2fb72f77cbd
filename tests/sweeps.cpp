// Every sweep of csrc/cpu over two arrays, side by side and far apart: prints those whose bits depend on it.
#include "../csrc/cpu/pieces.cpp"

#include <cstdio>
#include <cstring>
#include <random>

namespace {
using namespace mlkernels;
using namespace mlkernels::MLKERNELS_ISA;

constexpr int MOST = 40;
std::mt19937 generator(1);

template <class T, class Sweep>
void visit(const char* name, Sweep sweep) {
  std::uniform_real_distribution<T> draw(-1, 1);
  for (int n = 1; n <= MOST; ++n)
    for (int repetition = 0; repetition < 20; ++repetition) {
      T a[MOST], b[MOST], apart[8 * MOST] = {}, near[8 * MOST] = {};
      for (int i = 0; i < n; ++i) a[i] = draw(generator), b[i] = draw(generator);
      const auto go = [&](T* first, T* second) {
        std::memcpy(first, a, sizeof(T) * n);
        std::memcpy(second, b, sizeof(T) * n);
        sweep(first, second, n);
        return first;
      };
      const T* const wanted = go(apart, apart + 7 * MOST);
      for (const int distance : {-n - 1, -n, n, n + 1, n + 2})
        if (std::memcmp(go(near + 4 * MOST, near + 4 * MOST + distance), wanted, sizeof(T) * n)) {
          std::printf("%s of %d numbers of %d bytes, %d apart\n", name, n, int(sizeof(T)), distance);
          return;
        }
    }
}

template <class T>
void visit_all() {
  visit<T>("slope", [](T* g, T* u, int64_t n) { sweep_slope<T>(g, u, n, T(.3), T(1.7), T(.9)); });
  visit<T>("spread", [](T* g, T* w, int64_t n) { sweep_spread<T>(g, w, n, T(.3)); });
  visit<T>("add", [](T* to, T* from, int64_t n) { sweep_add<T>(to, from, n, T(.3)); });
  visit<T>("put", [](T* to, T* from, int64_t n) { sweep_put<T, T>(to, from, n, T(.3)); });
  visit<T>("exp", [](T* to, T* from, int64_t n) {
    sweep_exp<T, true, true>(from, to, n, T(1), T(1.1), T(.7), Ahead{nullptr, 0});
  });
  visit<T>("along_length", [](T* g, T* direction, int64_t n) {
    const T inverse = T(.7);
    along_length<T>(g, direction, &inverse, 1, n);
  });
  visit<T>("product", [](T* g, T* by, int64_t n) { sweep_product<T>(g, by, n); });
  visit<T>("prepare", [](T* u, T* slope, int64_t n) { prepare_row<T>({T(3.1), nullptr}, u, slope, n); });
}
}  // namespace

int main() {
  visit_all<float>();
  visit_all<double>();
}
