// Threads that work on one job together and meet at barriers.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
inline void relax() { _mm_pause(); }
#elif defined(__aarch64__)
inline void relax() { __asm__ __volatile__("yield"); }
#else
inline void relax() {}
#endif

class Pool {
public:
    explicit Pool(int threads) : size_(threads) {
        for (int t = 1; t < threads; t++) workers_.emplace_back([this, t] { serve(t); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = nullptr;
            round_.fetch_add(1);
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    int size() const { return size_; }

    // Call job(thread) on every thread, the caller's among them; return when all are done.
    template <class Job>
    void run(const Job& job) {
        if (size_ == 1) return job(0);
        {
            std::lock_guard<std::mutex> lock(mutex_);  // or a worker that is about to sleep would miss it
            context_ = &job;
            job_ = [](const void* context, int thread) { (*static_cast<const Job*>(context))(thread); };
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        job(0);
        barrier();
    }

    // Wait until every thread has come here.
    void barrier() {
        if (size_ == 1) return;
        const unsigned phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) pause(spins);
    }

private:
    static constexpr int SPINS = 4000;               // some 100 microseconds
    static constexpr int IDLE_SPINS = SPINS + 1000;  // some 600: longer than drawing a token takes, and waking up takes long

    static void pause(int spins) {
        if (spins < SPINS)
            relax();
        else
            std::this_thread::yield();  // another program, or Python, has the core that the others need
    }

    void serve(int thread) {
        for (unsigned seen = 0;;) {
            for (int spins = 0; spins < IDLE_SPINS && round_.load(std::memory_order_acquire) == seen; spins++)
                pause(spins);
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
            }
            seen++;
            if (!job_) return;
            job_(context_, thread);
            barrier();
        }
    }

    const int size_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    void (*job_)(const void*, int) = nullptr;
    const void* context_ = nullptr;
    std::atomic<unsigned> round_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> phase_{0};
};
