#include "buffers.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace mlkernels {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t HUGE_PAGE = size_t(2) << 20;
// What no step has taken for as long is lent to the system, which takes it when memory is short: not at once, because
// that is a walk through the page tables at every step, a tenth of it and more.
constexpr std::chrono::milliseconds LENT(250);
// As long: it is another loop's, and goes.
constexpr std::chrono::seconds KEPT(10);

struct Store {
  std::mutex mutex;
  std::vector<Buffer*> idle;      // the one given last is last
  size_t in_use = 0, mapped = 0;  // bytes
  size_t buffers = 0;             // idle has room for all: to be given back takes no memory
  size_t most_in_use = 0;  // since all was released; no more is ever mapped: the peak of an allocator that keeps none
  bool watched = false;    // by a thread of this process

  void unmap(size_t index) {
    Buffer* buffer = idle[index];
    idle.erase(idle.begin() + ptrdiff_t(index));
    munmap(buffer->data, buffer->bytes);
    mapped -= buffer->bytes;
    --buffers;
    delete buffer;
  }
};

// Never destroyed: tensors may outlive every static object.
Store& store() {
  static Store* const only = [] {
    // A lock that another thread holds while the process forks would stay locked in the child.
    pthread_atfork([] { store().mutex.lock(); }, [] { store().mutex.unlock(); },
                   [] {
                     store().watched = false;  // threads stay in the parent
                     store().mutex.unlock();
                   });
    return new Store;
  }();
  return *only;
}

bool switched_on() {
  static const bool on = [] {
    const char* said = std::getenv("MLKERNELS_CPU_BUFFERS");
    return !(said && std::strcmp(said, "0") == 0);
  }();
  return on;
}

// Begins and ends at huge pages, which the kernel gives only there. Null: there is no memory.
void* map(size_t bytes) {
  void* const all = mmap(nullptr, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(all);
  const size_t before = (HUGE_PAGE - uintptr_t(all) % HUGE_PAGE) % HUGE_PAGE;
  if (before) munmap(begin, before);
  munmap(begin + before + bytes, HUGE_PAGE - before);
#ifdef MADV_HUGEPAGE
  (void)madvise(begin + before, bytes, MADV_HUGEPAGE);  // advice: where it is refused the pages are small ones
#endif
  return begin + before;
}

void lend(Buffer* buffer) {
#ifdef MADV_FREE
  (void)madvise(buffer->data, buffer->bytes, MADV_FREE);
#endif
  buffer->lent = true;
}

// Until nothing is idle any more.
void watch() {
  Store& s = store();
  for (;;) {
    std::this_thread::sleep_for(LENT);
    const std::lock_guard<std::mutex> lock(s.mutex);
    const auto now = Clock::now();
    for (size_t i = s.idle.size(); i-- > 0;) {
      Buffer* buffer = s.idle[i];
      if (now - buffer->idle_since > KEPT)
        s.unmap(i);
      else if (!buffer->lent && now - buffer->idle_since > LENT)
        lend(buffer);
    }
    s.watched = !s.idle.empty();
    if (!s.watched) return;
  }
}

// With the store's mutex held; false where there is no thread to be had.
bool start_watching() noexcept {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the threads' that wait for them
  bool started = true;
  try {
    std::thread(watch).detach();
  } catch (const std::exception&) {  // no thread, or no memory for one
    started = false;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return started;
}

}  // namespace

Buffer* take_buffer(size_t bytes) {
  if (!switched_on()) return nullptr;
  bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  Buffer* found = nullptr;
  for (Buffer* buffer : s.idle)
    if (buffer->bytes >= bytes && !(found && found->bytes < buffer->bytes)) found = buffer;
  if (found) s.idle.erase(std::find(s.idle.begin(), s.idle.end(), found));
  if (!found) {
    s.idle.reserve(s.buffers + 1);
    s.most_in_use = std::max(s.most_in_use, s.in_use + bytes);
    while (!s.idle.empty() && s.mapped + bytes > s.most_in_use) s.unmap(0);
    void* data = map(bytes);
    if (!data && !s.idle.empty()) {
      while (!s.idle.empty()) s.unmap(0);
      data = map(bytes);
    }
    if (!data) return nullptr;
    found = new Buffer{data, bytes, {}, false};
    s.mapped += bytes;
    ++s.buffers;
  }
  s.in_use += found->bytes;
  return found;
}

void give_buffer(Buffer* buffer) noexcept {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.in_use -= buffer->bytes;
  buffer->idle_since = Clock::now();
  buffer->lent = false;
  s.idle.push_back(buffer);
  if (!s.watched) s.watched = start_watching();
  if (!s.watched) lend(buffer);
}

size_t release_buffers() {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const size_t before = s.mapped;
  while (!s.idle.empty()) s.unmap(s.idle.size() - 1);
  s.most_in_use = s.in_use;
  return before - s.mapped;
}

}  // namespace mlkernels
